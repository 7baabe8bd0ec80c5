"""The benchmark of GGUF files: the parts that need no llama.cpp, on a tiny random Mixtral; its files."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.gguf_file import gguf_of
from bench.gguf_models import dense_bytes, float_folder, random_gguf
from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.checkpoint.gguf.file import open_gguf

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mixtral with a byte-level tokenizer of the same vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bench") / "model"
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("h", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tiny_mixtral(vocab_size=264).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*options):
    command = [sys.executable, str(ROOT / "scripts" / "bench_gguf.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_last_line_tells_how_much_memory_a_quarter_takes(folder, tmp_path):
    file = gguf_of(folder, tmp_path)
    file.rename(file.with_name(file.name.replace("f16", "q4_k_m")))  # llama.cpp would make it of the other
    done = run("--model", folder, "--work", tmp_path, "--only", "memory", "--cases", "model", "--tokens", 6)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])["results"]["memory"]["model"]
    assert row["over_bytes"] == row["peak_bytes"] - row["budget_bytes"] - row["dense_bytes"]
    assert 0 < row["dense_bytes"] < row["file_bytes"]


def test_unknown_parts_are_refused():
    done = run("--only", "decode,speed")
    assert done.returncode == 2
    assert "--only speed: known are exact, logits, decode, capped, memory" in done.stderr


def test_the_values_of_a_file_are_those_that_it_was_written_from(folder, tmp_path):
    values = float_folder(gguf_of(folder, tmp_path), tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(values).state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0"])
def test_a_random_file_is_a_model(kind, folder, tmp_path):
    file = random_gguf(tmp_path, "tiny", SIZES, kind, folder)
    held = open_gguf(file)
    assert (
        {"Q8_0"} == {e.dtype for e in held.tensors.values()} - {"F32"}
        if kind == "q8_0"
        else "Q6_K" in {entry.dtype for entry in held.tensors.values()}
    )
    assert dense_bytes(held, of_a_step=True) == dense_bytes(held) - held.tensors["token_embd.weight"].num_bytes
    model = load_moe(file, device="cpu", dtype="float32", predictor=None)
    with model.moeflow, torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()
