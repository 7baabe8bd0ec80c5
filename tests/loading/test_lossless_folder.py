"""A folder packed without loss in place of its bfloat16 source: all that reads a model gives the same of both."""

from contextlib import closing

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.expert_runtimes import ThreadStreams
from helpers.lossless_models import NOT_WORTH_IT, lossless_mixtral
from helpers.small_tokenizers import byte_tokenizer
from moeflow import load_moe
from moeflow.checkpoint.float_source import parameters_of
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.checkpoint.store import ExpertStore
from moeflow.cli.main import main
from moeflow.convert.calibrate import record_text
from moeflow.convert.mixed_precision import choose_formats
from moeflow.convert.pack import pack_model
from moeflow.convert.quantize import quantize_model
from moeflow.hf.model_folder import ModelFolder
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.describe import describe_model
from moeflow.offload.host_tier import HostTier
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.slot_pool import SlotPool
from moeflow.policy.cache import ExpertCache
from moeflow.trace.trace import RoutingTrace

PROMPT = torch.arange(1, 12).unsqueeze(0)
TEXT = "the quick brown fox jumps over the lazy dog. " * 80


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The source, the same packed without loss, and packed as it is."""
    below = tmp_path_factory.mktemp("models")
    lossless_mixtral(vocab_size=len(byte_tokenizer())).save_pretrained(below / "source")
    byte_tokenizer().save_pretrained(below / "source")
    for name, flag in (("lossless", True), ("plain", False)):
        pack_model(below / "source", below / name, lossless=flag)
    return [below / name for name in ("source", "lossless", "plain")]


def logits(folder, **options):
    with torch.no_grad(), (model := load_moe(folder, device="cpu", predictor=None, **options)).moeflow:
        return torch.cat((model(PROMPT).logits, model(PROMPT[:, :1]).logits), 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float64"])
def test_every_dtype_computes_as_from_the_source(folders, dtype):
    expected, found = (logits(folder, dtype=dtype) for folder in folders[:2])
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("option", [{"quantization": "int4"}, {"quantization": "lossless"}, {"prune": 0.5}], ids=str)
def test_every_option_that_changes_experts_works(folders, option):
    expected, found = (logits(folder, **option) for folder in folders[:2])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("formats", ["int3-g32", [["int4-g64", "int8"] * 4] * 3], ids=["one", "each"])
def test_quantising_it_writes_the_same_files(folders, tmp_path, formats):
    written = [quantize_model(folder, tmp_path / folder.name, formats, method="rtn") for folder in folders]
    for name in (PACKED_FILE, "model.safetensors", "config.json"):
        assert len({(one.folder / name).read_bytes() for one in written}) == 1
    assert len({one._replace(folder=None, formats=None) for one in written}) == 1


def test_calibration_sees_the_same_experts(folders, tmp_path):
    inputs = [record_text(folder, TEXT, num_tokens=512) for folder in folders]
    for folder, seen in zip(folders, inputs, strict=True):
        quantize_model(folder, tmp_path / folder.name, "int4", method="gptq", calibration=seen)
    assert len({(tmp_path / folder.name / PACKED_FILE).read_bytes() for folder in folders}) == 1


def test_formats_for_each_expert_are_the_same(folders):
    found = [choose_formats(folder, TEXT, 3.0, num_tokens=512, method="rtn") for folder in folders[:2]]
    assert found[0].formats == found[1].formats
    assert found[0].budget_bytes == found[1].budget_bytes


def test_info_names_the_format_once(folders, capsys):
    about = describe_model(folders[1])
    assert about["dtype"] == "BF16, bf16-lossless"
    assert about["lossless"] is None
    assert len(about["expert_bytes"]) > 1
    assert about["experts_bytes"] < 0.9 * describe_model(folders[0])["experts_bytes"]
    assert main(["info", str(folders[1])]) == 0
    assert "bf16-lossless" in capsys.readouterr().out


def test_routes_are_recorded_as_from_the_source(folders, tmp_path):
    (tmp_path / "prompts.txt").write_text("one two three\nfour five six\n")
    for folder in folders[:2]:
        arguments = ["--prompts", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / folder.name)]
        assert main(["trace", "record", str(folder), *arguments, "--max-new-tokens", "4"]) == 0
    source, lossless = (RoutingTrace.open(tmp_path / folder.name) for folder in folders[:2])
    assert source.fingerprint == lossless.fingerprint
    assert np.array_equal(source.experts, lossless.experts)
    assert np.array_equal(source.weights, lossless.weights)


def test_tiers_like_a_gpus_hand_out_each_expert_as_it_is_stored(folders):
    """Slots of one size behind a host tier, whose copies run in a thread: lossless records, and one of bfloat16."""
    folder, cpu = ModelFolder(folders[1]), torch.device("cpu")
    empty = folder.empty_model()
    layers = folder.layers(empty)
    size = ExpertsSize.of([source.layout for source in layers], 2, whole_slots=True)
    assert size.pages is None
    host = HostTier(SlotPool(4, size.slot_bytes, cpu), ExpertCache(4, "lru"))
    parts = ExpertStore(folder.expert_files, layers), SlotPool(3, size.slot_bytes, cpu), ExpertCache(3, "lru")
    weights = {name: value for name, value in load_file(folders[0] / "model.safetensors").items() if "experts" in name}
    with ExpertRuntime(*parts, ThreadStreams(), host=host, num_threads=2) as runtime:
        for layer in (0, 1, 2, 1, 0):
            for expert in range(8):
                with closing(runtime.fetch(layer, [expert])) as fetched:
                    for [resident] in fetched:
                        assert bool(resident.record.matrices) == ((layer, expert) != NOT_WORTH_IT)
                        found = parameters_of(resident.pool.tensor[resident.slot], resident.record)
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                assert torch.equal(found["gate_up_proj"], torch.cat([weights[f"{name}.w{n}.weight"] for n in (1, 3)]))
                assert torch.equal(found["down_proj"], weights[f"{name}.w2.weight"])
