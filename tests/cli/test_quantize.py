"""`moeflow quantize --average-bits` on a tiny checkpoint with a tokenizer: what it writes, and what it learns from."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from helpers.small_tokenizers import byte_tokenizer
from moeflow import load_moe
from moeflow.calibration.windows import varied_windows
from moeflow.cli.main import main


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<|im_end|>", pad_token="<|pad|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantised(capsys, folder, out, *options):
    assert main(["quantize", str(folder), str(out), "--group-size", "32", "--method", "rtn", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("average_bits", [2.5, 3])
def test_average_bits_without_a_text_gives_a_folder_that_loads_and_keeps_to_the_bytes(
    capsys, folder, tmp_path, average_bits
):
    about = quantised(capsys, folder, tmp_path / "out", "--average-bits", str(average_bits))
    assert sum(about["formats"].values()) == 8
    assert about["bits_per_weight"] <= average_bits + 1  # a scale and a zero of 16 bits for 32 weights
    assert about["gap"] >= 0
    found = load_moe(tmp_path / "out", device="cpu", predictor=None)
    try:
        assert found(input_ids=torch.arange(16)[None]).logits.isfinite().all()
    finally:
        found.moeflow.close()


def test_average_bits_learns_from_the_text_it_is_given(capsys, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 300)
    about = quantised(capsys, folder, tmp_path / "out", "--average-bits", "2.5", "--calibration", str(text))
    assert sum(about["formats"].values()) == 8
    text.write_text("too short")
    assert main(["quantize", str(folder), str(tmp_path / "b"), "--average-bits", "2.5", "--calibration", str(text)])
    assert "fewer than 256 tokens" in capsys.readouterr().err


def test_texts_at_hand_are_half_the_models_own(model, tokenizer):
    windows = varied_windows(model, tokenizer, 8 * 128)
    assert [len(window) for window in windows] == [128] * 8
    openings = [tokenizer.decode(window[:60]) for window in windows[::2]]
    assert len(set(openings)) == 4
    assert varied_windows(model, tokenizer, 8 * 128) == windows
