"""Sizes by names and shapes are those of the model that transformers would build."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.large_checkpoint import write_large_checkpoint
from helpers.paths import ROOT
from moeflow.convert.pack import pack_model
from moeflow.engine.kv_cache.windows import MARGIN
from moeflow.errors import CheckpointError, ConfigError, ModelSourceError, UnsupportedModelError
from moeflow.fit.config_facts import Attention
from moeflow.fit.formats import other_formats
from moeflow.fit.sizes import WINDOW_MARGIN, ModelSizes, kept_values, sizes_of
from moeflow.hf import experts_interface
from moeflow.hf.model_folder import ModelFolder
from moeflow.loading.budget import ExpertsSize

# One of each way to store experts: a tensor each, stacked, transposed with biases, two sizes, and hybrids.
_STORED_APART = (
    "mixtral",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "ernie4_5_vl_moe",
    "nemotron_h",
    "deepseek_v3",
    "qwen3_next",
)
_LARGE = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "hidden_size": 7168, "vocab_size": 129280, "torch_dtype": "bfloat16", "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "num_attention_heads": 128,
}  # fmt: skip


def built(folder: Path) -> tuple[ExpertsSize, int]:
    """The sizes of experts and dense weights by the empty model that transformers builds."""
    model = ModelFolder(folder)
    empty = model.empty_model()
    feeding = model.feeding(empty)
    dense = sum(entry.num_bytes for name, entry in model.checkpoint.tensors.items() if name not in feeding)
    layouts = [source.layout for source in model.layers(empty)]
    return ExpertsSize.of(layouts, experts_interface.num_experts_per_tok(empty)), dense


def told(sizes: ModelSizes) -> tuple:
    form = sizes.published
    return sizes.num_experts, sizes.top_k, sizes.slot_bytes(form), sizes.experts_bytes(form), sizes.dense_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in _STORED_APART if name in FAMILIES])
def test_sizes_are_those_of_the_model_that_transformers_builds(name, tmp_path):
    build_model(FAMILIES[name]).save_pretrained(tmp_path)
    size, dense = built(tmp_path)
    assert told(sizes_of(tmp_path)) == (
        size.num_experts, size.num_experts_per_tok, size.slot_bytes, size.all_bytes, dense,
    )  # fmt: skip


def test_a_packed_folder_has_the_sizes_of_its_records(mixtral_folder, tmp_path):
    pack_model(mixtral_folder, tmp_path / "packed")
    size, dense = built(tmp_path / "packed")
    sizes = sizes_of(tmp_path / "packed")
    assert told(sizes) == (size.num_experts, size.num_experts_per_tok, size.slot_bytes, size.all_bytes, dense)
    assert sizes.layers[0].pieces == 1
    assert sizes.config.fingerprint == sizes_of(mixtral_folder).config.fingerprint


def test_narrower_formats_take_fewer_bytes_of_disk_and_memory(mixtral_folder):
    sizes = sizes_of(mixtral_folder)
    forms = [sizes.published, *other_formats(sizes.published)]
    held = [sizes.experts_bytes(form) for form in forms]
    assert held == sorted(held, reverse=True)
    assert [sizes.file_bytes(form) - sizes.dense_file_bytes for form in forms[1:]] == held[1:]


def test_a_window_bounds_what_a_layer_keeps():
    attention = Attention((10, 10, 0), (0, 4, 0))
    assert kept_values(attention, 100, 16) == 10 * 100 + 10 * (3 + WINDOW_MARGIN + 16)
    assert kept_values(attention, 100, 100) == 20 * 100
    assert WINDOW_MARGIN == MARGIN


@pytest.mark.slow
def test_a_model_of_671b_parameters_is_measured_without_torch_in_100_mb(tmp_path):
    write_large_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(_LARGE))
    code = (
        "import sys; from moeflow.fit.sizes import sizes_of; from moeflow.hardware import process_memory_bytes\n"
        "sizes = sizes_of(sys.argv[1])\n"
        "print(sizes.num_experts, sizes.experts_bytes(sizes.published), process_memory_bytes()[1])\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT)
    count, held, peak, has_torch = run.stdout.split()
    assert (int(count), int(held), has_torch) == (58 * 256, 58 * 256 * 3 * 2 * 2048 * 7168, "False")
    assert int(peak) < 100_000_000


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(ModelSourceError, match="is not a folder"):
        sizes_of(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        sizes_of(tmp_path)


def test_a_dense_model_is_refused(mixtral_folder, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"no tensor of .* is of routed experts"):
        sizes_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "error"), [("{", "is not JSON"), ("[]", "a list"), ('{"hidden_size": "x"}', "is missing")]
)
def test_a_broken_config_is_named(text, error, mixtral_folder, tmp_path):
    for file in mixtral_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=error):
        sizes_of(tmp_path)
