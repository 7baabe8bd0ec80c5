"""Folders written of a GGUF file: packed as it is, or its experts rounded again where that is asked for."""

import shutil

import pytest
import torch

from helpers.small_gguf import type_of, write_small
from moeflow import load_moe
from moeflow.cli.main import main
from moeflow.convert.pack import pack_model
from moeflow.convert.quantize import quantize_model
from moeflow.doctor.check_model import check_model
from moeflow.doctor.finding import works
from moeflow.errors import ConfigError
from moeflow.fit.source import model_source
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import find_format
from moeflow.kernels.quantization.quantize import quantize as round_to
from moeflow.verify.verify import verify

PROMPT = torch.arange(5, 16)[None]


def logits(model, **options):
    loaded = load_moe(model, device="cpu", dtype="float32", **options)
    with loaded.moeflow, torch.no_grad():
        return loaded(PROMPT).logits


@pytest.fixture
def file(gguf_file, tmp_path):
    return shutil.copytree(gguf_file.parent, tmp_path / "source") / gguf_file.name


def test_a_packed_folder_has_the_bits_of_its_file_and_needs_it_no_more(file, tmp_path):
    packed = pack_model(file, tmp_path / "packed")
    expected = logits(file, expert_memory="50%")
    found = verify(packed.folder, reference=file, text=[list(range(5, 30))])
    assert found.equal
    assert found.layers[0].rounding == 0
    shutil.rmtree(file.parent)
    packed.folder.rename(tmp_path / "moved")
    assert torch.equal(logits(tmp_path / "moved", expert_memory="50%"), expected)
    model = load_moe(tmp_path / "moved", device="cpu", predictor=None)
    with model.moeflow:
        assert model.lm_head.format == "q8_0"
    assert works(found := check_model(tmp_path / "moved", lambda share, text: None)), found
    with model_source(tmp_path / "moved", print) as (sizes, disk):
        assert (sizes.published.kernel, disk) == ("q4_k", tmp_path / "moved")


def test_blocks_are_rounded_again_only_where_that_is_asked_for(file, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"are in q4_k, q6_k already: .* --requantize \(requantize=True\)"):
        quantize_model(file, tmp_path / "out", "int4-g64")
    assert main(["quantize", str(file), str(tmp_path / "out"), "--bits", "8", "--method", "rtn", "--requantize"]) == 0
    assert "12 experts in int8-g64" in capsys.readouterr().out


def test_what_is_rounded_are_the_values_of_the_blocks(tmp_path):
    file, model = write_small(tmp_path / "source")
    quantize_model(file, tmp_path / "out", "int8-g64", method="rtn", requantize=True)
    spec = find_format("int8-g64")
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(layer.mlp.experts, name).data
            for matrix in stack:
                matrix.copy_(dequantize(round_to(matrix, spec), "weight", spec, tuple(matrix.shape)))
    with torch.no_grad():
        expected = model(PROMPT).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-3, atol=float(1e-4 * expected.abs().max()))


def test_experts_in_float16_are_quantised_without_a_word(tmp_path):
    from helpers.gguf_models import write_model
    from helpers.small_gguf import small_model

    def kinds(name, shape):
        return "F16" if "_exps" in name else type_of(name, shape)

    write_model(tmp_path / "half.gguf", "qwen3moe", small_model(), kinds)
    assert quantize_model(tmp_path / "half.gguf", tmp_path / "out", "int4-g64").formats == {"int4-g64": 12}
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_choosing_a_width_for_each_expert_needs_floats(file, tmp_path, capsys):
    assert main(["quantize", str(file), str(tmp_path / "out"), "--average-bits", "3", "--requantize"]) == 1
    assert "stored in q4_k already. Calibrate with the model's float checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_gptq_learns_from_the_values_of_blocks(file, tmp_path):
    """Rounded to the same width, the values that it chooses change the logits no more than those nearest do."""
    expected, changed = logits(file), {}
    for method in ("gptq", "rtn"):
        command = ["quantize", str(file), str(tmp_path / method), "--bits", "4", "--method", method, "--requantize"]
        assert main(command) == 0
        changed[method] = float((logits(tmp_path / method) - expected).norm() / expected.norm())
    assert 0 < changed["gptq"] < 1.2 * changed["rtn"]


def test_a_gguf_file_is_not_written_of_another(file, tmp_path, capsys):
    assert main(["gguf", str(file), "-o", str(tmp_path / "other.gguf")]) == 1
    assert "GGUF" in capsys.readouterr().err
