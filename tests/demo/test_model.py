"""The demo model's build: on a tiny dense Llama, without a network."""

import hashlib
import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import moeflow
from moeflow.calibration.sample_texts import calibration_prompts, library_texts
from moeflow.checkpoint.headers import read_header
from moeflow.demo import model as demo_model
from moeflow.demo.model import build_checkpoint, default_demo_path
from moeflow.demo.recipe import Recipe
from moeflow.demo.split import replay_layer, split_layer
from moeflow.demo.stages import Stages
from moeflow.demo.stream import Stream
from moeflow.errors import DemoModelError

pytestmark = pytest.mark.slow

NUM_LAYERS = 3
TINY = Recipe(
    num_experts=4, expert_size=32, kmeans_rounds=4, num_prompts=6, num_new_tokens=8, num_library_tokens=1024
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Builds in a process of its own and kills it without warning after STEPS steps of STAGE.
DRIVER = """
import os, signal, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from moeflow.demo.model import build_checkpoint
from moeflow.demo.stages import Stages
from moeflow.demo.recipe import Recipe

dense, out, recipe, stage, steps = sys.argv[1:]
torch.set_num_threads(1)

class Fatal(Stages):
    left = int(steps)

    def advance(self):
        if self._name == stage:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

def load_dense(work):
    return AutoModelForCausalLM.from_pretrained(dense).eval(), AutoTokenizer.from_pretrained(dense)

build_checkpoint(load_dense, Path(out), eval(recipe), "tiny", disk_bytes=0, stages=Fatal(False))
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A folder with a tiny dense Llama and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("dense")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_and_tokenizer(dense):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(dense).eval(), AutoTokenizer.from_pretrained(dense)


@pytest.fixture(scope="module")
def texts(model_and_tokenizer) -> list[list[int]]:
    return library_texts(model_and_tokenizer[1], 4096, piece_tokens=128)


@pytest.fixture(scope="module")
def built(dense, tmp_path_factory) -> Path:
    """A build that nothing interrupted."""
    out = tmp_path_factory.mktemp("built") / "demo"
    assert _finish(_start_build(dense, out)) == 0
    return out


def _start_build(dense: Path, out: Path, stage: str = "", steps: int = 0) -> subprocess.Popen:
    checkout = str(Path(moeflow.__file__).parents[1])
    command = [sys.executable, "-c", DRIVER, str(dense), str(out), repr(TINY), stage, str(steps)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": checkout})


def _finish(process: subprocess.Popen) -> int:
    return process.wait(timeout=300)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _forbidden_load(work):
    raise AssertionError("the dense model was loaded")


def _build(load_dense, out: Path, recipe: Recipe = TINY, disk_bytes: int = 0) -> Path:
    return build_checkpoint(load_dense, out, recipe, "tiny", disk_bytes, Stages(False))


def test_checkpoint_loads_as_mixtral_with_no_missing_and_no_unexpected_keys(built):
    from transformers import MixtralForCausalLM

    model, report = MixtralForCausalLM.from_pretrained(built, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.rope_parameters["rope_theta"] == 100_000.0
    assert model.config.tie_word_embeddings
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (4, 2)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2


def test_tokenizer_of_the_checkpoint_keeps_the_chat_template(built, model_and_tokenizer):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built)
    messages = [{"role": "user", "content": "Hello"}]
    expected = model_and_tokenizer[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>user\nHello<|im_end|>" in expected
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_index_names_every_tensor_in_the_hubs_mixtral_form(built):
    weight_map = json.loads((built / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: path.name for path in built.glob("*.safetensors") for name in read_header(path)}
    assert weight_map == found
    experts = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
        for layer in range(NUM_LAYERS)
        for expert in range(4)
        for matrix in ("w1", "w2", "w3")
    }
    assert {name for name in weight_map if ".experts." in name} == experts


def test_tensors_of_one_expert_are_adjacent_in_the_file(built):
    for path in built.glob("*.safetensors"):
        ranges: dict[str, list] = {}
        for name, entry in read_header(path).items():
            if ".experts." in name:
                ranges.setdefault(name.rsplit(".", 2)[0], []).append((entry.begin, entry.begin + entry.num_bytes))
        for expert, offsets in ranges.items():
            first, second, third = sorted(offsets)
            assert first[1] == second[0], expert
            assert second[1] == third[0], expert


def test_killed_build_continues_and_equals_an_uninterrupted_one(dense, built, tmp_path):
    out = tmp_path / "demo"
    partial = tmp_path / "demo.partial"
    assert _finish(_start_build(dense, out, "layers", 2)) == -9
    assert not out.exists()
    assert sorted(path.name for path in partial.glob("layer-*")) == ["layer-0000.safetensors", "layer-0001.safetensors"]
    assert _finish(_start_build(dense, out, "write", 1)) == -9
    assert not out.exists()
    assert [path.name for path in (partial / "checkpoint").glob("*.safetensors")]
    assert _finish(_start_build(dense, out)) == 0
    assert not partial.exists()
    assert _digests(out) == _digests(built)


def test_two_processes_at_once_give_one_good_checkpoint(dense, built, tmp_path):
    out = tmp_path / "demo"
    both = [_start_build(dense, out) for _ in range(2)]
    assert [_finish(process) for process in both] == [0, 0]
    assert _digests(out) == _digests(built)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_finished_model_is_returned_without_loading_anything(built):
    assert _build(_forbidden_load, built) == built


def test_finished_model_that_lost_a_shard_is_refused(built, tmp_path):
    out = tmp_path / "demo"
    out.mkdir()
    for name in ("demo_model.json", "model.safetensors.index.json"):
        (out / name).write_bytes((built / name).read_bytes())
    with pytest.raises(DemoModelError, match=r"lacks model-0000.*build it again"):
        _build(_forbidden_load, out)


def test_partial_build_of_other_inputs_is_discarded(model_and_tokenizer, tmp_path):
    partial = tmp_path / "demo.partial"
    partial.mkdir()
    (partial / "inputs.json").write_text(json.dumps({"format": 0}))
    (partial / "layer-0000.safetensors").write_bytes(b"of another recipe")
    out = _build(lambda work: model_and_tokenizer, tmp_path / "demo")
    assert (out / "config.json").is_file()


def test_interrupt_leaves_no_final_folder_and_a_build_that_continues(model_and_tokenizer, tmp_path):
    class Interrupted(Stages):
        def advance(self):
            if self._name == "layers":
                raise KeyboardInterrupt

    out = tmp_path / "demo"
    with pytest.raises(KeyboardInterrupt):
        build_checkpoint(lambda work: model_and_tokenizer, out, TINY, "tiny", 0, Interrupted(False))
    assert not out.exists()
    assert not (tmp_path / "demo.lock").exists()
    assert (tmp_path / "demo.partial" / "layer-0000.safetensors").is_file()
    assert _build(lambda work: model_and_tokenizer, out) == out


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DemoModelError, match="is not a demo model"):
        _build(_forbidden_load, tmp_path)


def test_small_disk_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(demo_model.shutil, "disk_usage", lambda path: usage(10**10, 10**10 - 10**9, 10**9))
    with pytest.raises(DemoModelError, match=r"has 1\.0 GB free, the build needs 2\.0 GB more"):
        _build(_forbidden_load, tmp_path / "demo", disk_bytes=2 * 10**9)
    assert not (tmp_path / "demo").exists()


def test_disk_that_fills_up_leaves_no_final_folder(model_and_tokenizer, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model, "write_layer", full)
    with pytest.raises(DemoModelError, match="the disk filled up"):
        _build(lambda work: model_and_tokenizer, tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_demo_path() == tmp_path / "mine" / "demo-model"
    monkeypatch.delenv("MOEFLOW_CACHE")
    assert default_demo_path() == tmp_path / "xdg" / "moeflow" / "demo-model"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_demo_path() == Path.home() / ".cache" / "moeflow" / "demo-model"


def test_module_imports_without_torch_or_transformers():
    code = "import sys, moeflow.demo.model as d; d.describe_demo_model(); sys.exit('torch' in sys.modules)"
    checkout = str(Path(moeflow.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": checkout}).returncode == 0


def test_experts_of_full_size_reproduce_the_dense_layers(model_and_tokenizer, texts):
    model, _ = model_and_tokenizer
    recipe = Recipe(num_experts=4, expert_size=64, kmeans_rounds=4)
    ids = torch.tensor(texts)
    with torch.inference_mode():
        stream = Stream(model, texts)
        for _ in range(NUM_LAYERS):
            split_layer(stream, recipe)
        expected = model.model(ids).last_hidden_state
        rows = model.model.norm(torch.cat(stream.hidden_states))
    assert (rows - expected).norm() < 0.01 * expected.norm()


def test_refitting_lowers_the_error_of_the_kept_neurons(model_and_tokenizer, texts):
    model, _ = model_and_tokenizer
    errors = []
    with torch.inference_mode():
        for sweeps in (0, 1, 3):
            stream = Stream(model, texts)
            split_layer(stream, Recipe(num_experts=4, expert_size=32, kmeans_rounds=4, ridge=0.01, sweeps=sweeps))
            dense = Stream(model, texts)
            layer = dense.attend()
            residual = dense.flat()
            expected = residual + layer.mlp(layer.post_attention_layernorm(residual))
            errors.append(float(((stream.flat() - expected) / expected.norm(dim=1, keepdim=True)).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_replay_gives_the_stream_that_splitting_gave(model_and_tokenizer, texts):
    model, _ = model_and_tokenizer
    uneven = [text[: 40 + 3 * i] for i, text in enumerate(texts)]
    with torch.inference_mode():
        first, second = Stream(model, uneven, batch_tokens=512), Stream(model, uneven, batch_tokens=512)
        for _ in range(NUM_LAYERS):
            replay_layer(second, split_layer(first, TINY), TINY)
        assert len(first.hidden_states) > 1
        assert torch.equal(first.flat(), second.flat())


def test_prompts_are_varied_and_decided_by_the_seed(model_and_tokenizer):
    tokenizer = model_and_tokenizer[1]
    prompts = calibration_prompts(tokenizer, 64, seed=3)
    assert prompts == calibration_prompts(tokenizer, 64, seed=3)
    assert prompts != calibration_prompts(tokenizer, 64, seed=4)
    assert len(set(map(tuple, prompts))) == 64
    assert sum(prompt[0] == tokenizer.bos_token_id for prompt in prompts) == 32


def test_missing_library_sources_give_less_text_and_no_error(model_and_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("moeflow.calibration.sample_texts.sysconfig.get_path", lambda name: str(tmp_path))
    (tmp_path / "heapq.py").write_text("# heap\n" * 400)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    pieces = library_texts(model_and_tokenizer[1], 100_000)
    assert 0 < len(pieces) < 10
