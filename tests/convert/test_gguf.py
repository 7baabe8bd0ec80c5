"""GGUF files that are written: the values of each type, what is refused, and what a broken run leaves."""

import shutil

import gguf
import numpy as np
import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.gguf_families import ReadBack, byte_tokenizer, gguf_families, save_family
from helpers.prequantized_checkpoints import make, tiny_model
from helpers.prequantized_models import CASES
from moeflow.convert.gguf import KINDS, write_gguf
from moeflow.convert.pack import pack_model
from moeflow.errors import ConfigError, MoeflowError, UnsupportedModelError

FAMILY = gguf_families()["mixtral"]


def read(file):
    """Bits of every tensor, and the metadata but for the name."""
    back = ReadBack(file)
    told = {key: value for key, value in back.metadata.items() if key != "general.name"}
    return told, {name: values.numpy().tobytes() for name, values in back.tensors.items()}


KEPT = ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight", "ffn_gate_inp.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "model"
    save_family(FAMILY, folder)
    return folder


@pytest.fixture(scope="module")
def exact(folder):
    """Every tensor of the file in float32."""
    write_gguf(folder, folder.parent / "exact.gguf", "f32")
    return ReadBack(folder.parent / "exact.gguf").tensors


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32"])
def test_matrices_get_the_type_and_all_else_stays_in_float32(folder, exact, tmp_path, kind):
    written = write_gguf(folder, tmp_path / "model.gguf", kind)
    back = ReadBack(written.file)
    assert written.num_bytes == written.file.stat().st_size
    assert written.num_tensors == len(back.tensors)
    assert back.tensors.keys() == exact.keys()
    for name, values in exact.items():
        expected = kind if not name.endswith(KEPT) else "f32"
        if expected == "q4_0" and name in ("token_embd.weight", "output.weight"):
            expected = "q8_0"
        assert back.kinds[name] == expected.upper(), name
        rounded = values.to({"f16": torch.float16, "bf16": torch.bfloat16}.get(expected, torch.float32)).float()
        if expected.startswith("q"):
            number = gguf.GGMLQuantizationType[expected.upper()]
            rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(values.numpy(), number), number))
        assert torch.equal(back.tensors[name].float(), rounded), name


def test_experts_may_have_a_type_of_their_own(folder, tmp_path):
    write_gguf(folder, tmp_path / "model.gguf", "f16", experts="q8_0")
    kinds = ReadBack(tmp_path / "model.gguf").kinds
    assert {kind for name, kind in kinds.items() if "_exps" in name} == {"Q8_0"}
    assert {kind for name, kind in kinds.items() if "_exps" not in name} == {"F16", "F32"}


def test_rows_that_no_block_fits_stay_in_float16(tmp_path):
    odd = gguf_families()["qwen3moe"]
    odd.overrides["moe_intermediate_size"] = 40
    save_family(odd, tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    kinds = ReadBack(tmp_path / "model.gguf").kinds
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0"


def test_bfloat16_weights_keep_every_bit(tmp_path):
    model = save_family(FAMILY, tmp_path / "model", torch.bfloat16)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "bf16")
    down = ReadBack(tmp_path / "model.gguf").tensors["blk.1.ffn_down_exps.weight"]
    assert torch.equal(down, model.model.layers[1].mlp.experts.down_proj.float())


def test_no_more_than_an_expert_is_converted_at_a_time(folder, tmp_path):
    done = [0]
    write_gguf(folder, tmp_path / "model.gguf", "f32", progress=lambda now, total: done.append(now))
    steps = np.diff(done)
    assert steps.max() == 4 * 320 * 128  # the embedding
    assert np.count_nonzero(steps == 4 * 96 * 128) >= 3 * 3 * 6  # three matrices of every expert


def test_what_float16_cannot_hold_is_refused(tmp_path):
    model = build_model(FAMILY)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.gate_up_proj[5, -1, -1] = 70000.0
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"blk\.2\.ffn_up_exps\.weight.*bf16"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_run_leaves_the_old_file_and_nothing_else(folder, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_text("old")

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(folder, out, progress=interrupt)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["model.gguf"]


def test_a_small_disk_is_told_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match="disk"):
        write_gguf(folder, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_told_first(folder, tmp_path):
    with pytest.raises(ConfigError, match="Make the folder"):
        write_gguf(folder, tmp_path / "none" / "model.gguf")


def test_packed_folders_give_the_same_file(folder, tmp_path):
    packed = pack_model(folder, tmp_path / "packed").folder
    for source, name in ((folder, "a"), (packed, "b")):
        write_gguf(source, tmp_path / name)
    assert read(tmp_path / "a") == read(tmp_path / "b")


@pytest.fixture(scope="module", params=["mxfp4, gpt-oss", "fp8, qwen3", "gptq, mixtral", "awq, qwen3"])
def quantised(request, tmp_path_factory):
    """A quantised checkpoint and its plain twin, with tokenizers."""
    case = CASES[request.param]
    model = tiny_model(case.family, **case.sizes)
    model.config.norm_topk_prob = True
    made = make(tmp_path_factory.mktemp("quantised"), model, case.quantization, case.quantise, case.is_quantised)
    for folder in made[:2]:
        byte_tokenizer().save_pretrained(folder)
    return request.param, *made[:2]


def test_of_quantised_weights_the_values_are_written(quantised, tmp_path):
    name, native, plain = quantised
    for folder in (native, plain):
        write_gguf(folder, tmp_path / folder.name, "f32")
    found, expected = (ReadBack(tmp_path / folder.name).tensors for folder in (native, plain))
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        torch.testing.assert_close(found[tensor], values, rtol=1e-6, atol=1e-7)
    if name.startswith("mxfp4"):
        write_gguf(native, tmp_path / "mxfp4", "bf16", experts="mxfp4")
        back = ReadBack(tmp_path / "mxfp4")
        experts = [tensor for tensor in expected if tensor.endswith("_exps.weight")]
        assert {back.kinds[tensor] for tensor in experts} == {"MXFP4"}
        assert all(torch.equal(back.tensors[tensor], expected[tensor]) for tensor in experts)


def test_a_gguf_file_is_no_source(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    write_gguf(folder, tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="GGUF file already"):
        write_gguf(tmp_path / "model.gguf", tmp_path / "again.gguf")


def test_an_unknown_type_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"'q9'.*q8_0"):
        write_gguf(folder, tmp_path / "model.gguf", "q9")


def test_a_family_without_an_architecture_is_refused(tmp_path):
    build_model(FAMILIES["zaya"]).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"zaya.*mixtral"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")


def test_a_model_without_a_tokenizer_is_told(tmp_path):
    build_model(FAMILY).save_pretrained(tmp_path / "model")
    with pytest.raises(MoeflowError, match="tokenizer"):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
