"""Models whose experts are quantised: at every read, or once into a packed folder, in one format or in many."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.families import FAMILIES
from helpers.family_models import build_model, inputs
from moeflow import load_moe
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.cli.main import main
from moeflow.convert.quantize import quantize_model
from moeflow.errors import CheckpointError, ConfigError, ExpertReadError
from moeflow.kernels.pruning import PruningThreshold
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.quantization.quantize import quantize

PROMPT = torch.arange(1, 12).unsqueeze(0)
FORMATS = ("int8", "int4-g64", "int3-g32", "int2-g128", "int1-g64")
MIXED = [[FORMATS[(layer + expert) % 5] for expert in range(8)] for layer in range(3)]


def logits(model, ids=PROMPT):
    with torch.no_grad():
        return model(ids).logits


def rounded(model, format, method="rtn"):
    """A copy of a Mixtral whose experts hold the values their codes stand for."""
    import copy

    model, spec = copy.deepcopy(model), find_format(format)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            for weight in getattr(layer.mlp.experts, name).data:
                codes = quantize(weight, spec, method=method, name="w")
                weight.copy_(dequantize(codes, "w", spec, tuple(weight.shape)))
    return model


@pytest.mark.parametrize("format", FORMATS)
def test_experts_quantised_at_load_compute_what_their_codes_stand_for(mixtral, mixtral_folder, format):
    model = load_moe(mixtral_folder, quantization=format)
    expected = logits(rounded(mixtral, format))
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()
    assert model.moeflow.store.layers[0].layout.record.matrices[0].format == format
    model.moeflow.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_a_quantised_folder_computes_what_its_codes_stand_for(mixtral, mixtral_folder, tmp_path, method):
    written = quantize_model(mixtral_folder, tmp_path / "out", "int4", method=method)
    expected = logits(rounded(mixtral, "int4-g64", method))
    model = load_moe(tmp_path / "out")
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()
    model.moeflow.close()
    assert 4.5 <= written.bits_per_weight < 5.5  # scales, zeros and padding of these small matrices


@pytest.fixture(scope="module")
def mixed_folder(mixtral_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("mixed") / "out"
    quantize_model(mixtral_folder, out, MIXED, method="rtn")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_many_formats_give_the_same_bits_at_every_budget_and_policy(mixed_folder, dtype):
    whole = load_moe(mixed_folder, expert_memory="100%", dtype=dtype)
    expected = [logits(whole, PROMPT + step) for step in range(4)]
    for policy in ("lru", "lfru", "static", "auto"):
        for budget in ("25%", "50%", "auto"):
            small = load_moe(mixed_folder, expert_memory=budget, policy=policy, dtype=dtype)
            for _ in range(2):
                for step in range(4):
                    assert torch.equal(logits(small, PROMPT + step), expected[step])
                    small.moeflow.check_integrity()
            memory = small.moeflow.stats()["memory"]
            assert memory["device_peak_bytes"] <= memory["expert_budget_bytes"]
            small.moeflow.close()


def test_small_experts_take_little_of_the_budget(mixed_folder):
    """Half of the bytes of all experts hold more than half of the experts, if the large ones are left out."""
    model = load_moe(mixed_folder, expert_memory="50%")
    store, cache = model.moeflow.store, model.moeflow.cache
    sizes = {record.num_bytes for source in store.layers for record in source.layout.variants}
    assert len(sizes) == 4  # padding makes two of them equal
    for step in range(6):
        logits(model, (PROMPT * 7 + step) % 128)
    assert model.moeflow.stats()["memory"]["all_experts_bytes"] < 24 * 20480  # not 24 of the largest
    assert cache.used <= cache.limit
    model.moeflow.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_families_with_biases_transposed_weights_or_shared_experts_can_be_quantised(name, tmp_path):
    family = FAMILIES[name]
    build_model(family).save_pretrained(tmp_path / "model")
    whole = load_moe(tmp_path / "model")
    expected = logits_of(whole, family)
    quantize_model(tmp_path / "model", tmp_path / "out", "int8")
    model = load_moe(tmp_path / "out")
    found = logits_of(model, family)
    assert (found - expected).norm() < 0.05 * expected.norm()
    loaded = load_moe(tmp_path / "model", quantization="int8")
    assert (logits_of(loaded, family) - found).norm() < 0.05 * expected.norm()
    for one in (whole, model, loaded):
        one.moeflow.close()


def logits_of(model, family):
    with torch.no_grad():
        return model(**inputs(family)).logits


def test_the_command_writes_a_folder_and_says_what_it_takes(mixtral_folder, tmp_path, capsys):
    assert main(["quantize", str(mixtral_folder), str(tmp_path / "out"), "--bits", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(tmp_path / "out")
    assert said["formats"] == {"int4-g64": 24}
    model = load_moe(tmp_path / "out")
    assert model.moeflow.stats()["num_experts"] == 24
    model.moeflow.close()


_QUANTIZE = """
import os, signal, sys
from moeflow.convert.quantize import quantize_model
def progress(done, total):
    if done > total * float(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
quantize_model(sys.argv[1], sys.argv[2], "int4", progress=progress)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(mixtral_folder, tmp_path):
    quantize_model(mixtral_folder, tmp_path / "whole", "int4")
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", _QUANTIZE, str(mixtral_folder), str(out), "0.6"], capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    journal = (tmp_path / "out.partial" / "experts.journal").read_text().split()
    assert 1 < len(journal) < 1 + 24 + 24  # the run's name, dense tensors and experts
    quantize_model(mixtral_folder, out, "int4")
    assert (out / PACKED_FILE).read_bytes() == (tmp_path / "whole" / PACKED_FILE).read_bytes()


@pytest.mark.slow
def test_a_partial_folder_of_another_format_or_method_is_begun_anew(mixtral_folder, tmp_path):
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", _QUANTIZE, str(mixtral_folder), str(out), "0.6"], capture_output=True)
    quantize_model(mixtral_folder, out, "int4", method="rtn")
    quantize_model(mixtral_folder, tmp_path / "whole", "int4", method="rtn")
    assert (out / PACKED_FILE).read_bytes() == (tmp_path / "whole" / PACKED_FILE).read_bytes()


@pytest.fixture
def broken_folder(mixtral, tmp_path):
    """A checkpoint in which one weight of expert 5 of layer 1 is not a number."""
    mixtral.save_pretrained(tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1" in name and "experts.5" in name)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return tmp_path / "broken"


def test_weights_that_are_no_numbers_are_refused_by_the_experts_name(broken_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"expert 5 of model\.layers\.1\.mlp\.experts"):
        quantize_model(broken_folder, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()
    model = load_moe(broken_folder, quantization="int4")
    with pytest.raises((CheckpointError, ExpertReadError), match=r"expert 5 of model\.layers\.1\.mlp\.experts"):
        logits(model, torch.arange(1, 128).unsqueeze(0))
    model.moeflow.check_integrity()
    model.moeflow.close()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"quantization": "int5"}, "not a weight format"),
        ({"quantization": "mxfp4"}, "cannot be quantised to mxfp4"),
        ({"quantization": "bfloat16"}, "cannot be quantised to bfloat16"),
    ],
)
def test_formats_that_cannot_be_written_are_refused(mixtral_folder, options, match):
    with pytest.raises(ConfigError, match=match):
        load_moe(mixtral_folder, **options)


def test_what_is_quantised_is_not_quantised_again(mixed_folder, tmp_path):
    with pytest.raises(ConfigError, match="already"):
        load_moe(mixed_folder, quantization="int4")
    with pytest.raises(ConfigError, match=r"is stored in int.* already"):
        quantize_model(mixed_folder, tmp_path / "out", "int4")
    with pytest.raises(ConfigError, match="unknown"):
        quantize_model(mixed_folder, tmp_path / "out", "int4", method="magic")
    with pytest.raises(ConfigError, match="calibration"):
        quantize_model(mixed_folder, tmp_path / "out", "int4", method="gptq")


def test_a_header_whose_matrices_do_not_fit_their_tensors_is_refused(mixed_folder, tmp_path):
    import shutil
    import zlib

    folder = shutil.copytree(mixed_folder, tmp_path / "copy")
    data = bytearray((folder / PACKED_FILE).read_bytes())
    length = int.from_bytes(data[8:16], "little")
    text = data[24 : 24 + length].replace(b'"format":"int4-g64"', b'"format":"int4-g32"', 1)
    data[24 : 24 + length] = text
    data[16:20] = zlib.crc32(text).to_bytes(4, "little")
    (folder / PACKED_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match="malformed"):
        load_moe(folder)


def test_a_token_that_is_pruned_to_its_first_expert_gets_that_one_with_all_the_weight(mixtral, mixtral_folder):
    from helpers.small_models import tiny_mixtral

    single = tiny_mixtral(num_experts_per_tok=1)
    single.load_state_dict(mixtral.state_dict())
    model = load_moe(mixtral_folder)
    for layer in model.model.layers:
        layer.mlp.experts._moeflow.use(before=[PruningThreshold(1.0).apply])
    expected = logits(single)
    assert (logits(model) - expected).norm() < 1e-5 * expected.norm()
    model.moeflow.close()


def test_pruning_needs_a_share_and_a_tokenizer(mixtral_folder):
    with pytest.raises(ConfigError, match="not a share"):
        load_moe(mixtral_folder, prune=1.5)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_moe(mixtral_folder, prune=0.5)
