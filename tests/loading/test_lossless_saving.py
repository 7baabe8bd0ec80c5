"""What `moeflow info` says of lossless experts: near what packing finds, for each dtype, or nothing."""

import json

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_models import tiny_mixtral
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.cli.main import main
from moeflow.convert.pack import pack_model
from moeflow.loading.describe import describe_model


def saved(folder, dtype, spread=0.0):
    model = tiny_mixtral(hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    for name, weight in model.named_parameters():
        if "experts" in name and spread:
            weight.data *= 2.0 ** (spread * torch.randn(weight.shape))
    model.to(dtype).save_pretrained(folder)
    return folder


def test_the_estimate_is_what_packing_finds(tmp_path):
    folder = saved(tmp_path / "model", torch.bfloat16)
    found = describe_model(folder)["lossless"]
    plain, small = (
        pack_model(folder, tmp_path / str(flag), lossless=flag).folder / PACKED_FILE for flag in (False, True)
    )
    assert found["share"] == pytest.approx(small.stat().st_size / plain.stat().st_size, abs=0.01)
    assert found["share"] < 0.78
    assert found["built"]
    assert found["experts_read"] == 2
    assert describe_model(small.parent)["lossless"] is None


@pytest.mark.parametrize(
    ("dtype", "share", "text"),
    [
        (torch.bfloat16, 0.755, "by the exponents of 2 experts: moeflow pack"),
        (torch.float32, 0.878, "not built for F32"),
        (torch.float16, 0.9375, "of these bytes at best"),
    ],
)
def test_each_dtype_has_its_share(tmp_path, capsys, dtype, share, text):
    saved(tmp_path, dtype)
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lossless"]["share"] == pytest.approx(share, abs=0.005)
    assert main(["info", str(tmp_path)]) == 0
    assert text in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exponents_that_differ_too_much_save_nothing(tmp_path, capsys, dtype):
    saved(tmp_path, dtype, spread=12.0)
    assert describe_model(tmp_path)["lossless"]["share"] == 1
    assert main(["info", str(tmp_path)]) == 0
    assert "no smaller: their exponents differ too much" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_said_of_matrices_in_by_out(tmp_path):
    build_model(FAMILIES["gpt_oss"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert describe_model(tmp_path)["lossless"] is None
