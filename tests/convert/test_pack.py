"""Packing without loss by default: what is stored and why, told; runs that were killed; folders that are packed."""

import json
import os
import shutil

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.lossless_models import lossless_mixtral
from moeflow import load_moe
from moeflow.checkpoint.lossless_source import any_lossless
from moeflow.checkpoint.pack_journal import JOURNAL
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.cli.main import main
from moeflow.convert.pack import pack_model
from moeflow.convert.quantize import quantize_model
from moeflow.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16") / "model"
    lossless_mixtral().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The folder packed both ways, by the value of `lossless`."""
    out = tmp_path_factory.mktemp("packed")
    return {flag: pack_model(folder, out / str(flag), lossless=flag).folder for flag in (True, False)}


@pytest.fixture(scope="module")
def int8(folder, tmp_path_factory):
    return quantize_model(folder, tmp_path_factory.mktemp("int8") / "out", "int8", method="rtn").folder


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_bfloat16_experts_are_stored_without_loss_by_default(folder, packed, tmp_path):
    found = pack_model(folder, tmp_path / "out")
    assert content(found.folder) == content(packed[True])
    assert (found.num_experts, found.num_lossless, found.why_floats) == (24, 23, "")
    assert found.weight_bytes < 0.9 * found.source_bytes
    assert found.source_bytes == (folder / "model.safetensors").stat().st_size


def test_without_it_experts_are_stored_as_they_are(packed):
    with load_moe(packed[False], device="cpu", predictor=None).moeflow as runtime:
        assert not any_lossless(runtime.store.layers)


@pytest.mark.parametrize(
    ("name", "dtype", "why"),
    [
        ("mixtral", torch.float32, "these experts are F32, and lossless is for bfloat16 (BF16)."),
        ("gpt_oss", torch.bfloat16, "stores its matrices [in, out], and lossless is for matrices [out, in]."),
    ],
)
def test_what_cannot_be_is_stored_as_it_is_and_it_is_said_why(tmp_path, capsys, name, dtype, why):
    build_model(FAMILIES[name]).to(dtype).save_pretrained(tmp_path / "model")
    assert main(["pack", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "experts as they are: " in said
    assert why in said
    plain = pack_model(tmp_path / "model", tmp_path / "plain", lossless=False)
    assert content(plain.folder) == content(tmp_path / "out")
    with pytest.raises(ConfigError, match="Leave lossless out"):
        pack_model(tmp_path / "model", tmp_path / "other", lossless=True)


def test_the_command_says_what_was_stored_and_its_share_of_the_source(folder, packed, tmp_path, capsys):
    for options, flag, said in (
        ([], True, "23 experts without loss, every bit kept; 1 as they are, for they save too little."),
        (["--lossless"], True, "23 experts without loss"),
        (["--no-lossless"], False, "24 experts as they are: lossless is off."),
    ):
        out = tmp_path / f"out{len(options)}{flag}"
        assert main(["pack", str(folder), str(out), *options]) == 0
        text = capsys.readouterr().out
        assert said in text
        share = sum((out / name).stat().st_size for name in (PACKED_FILE, "model.safetensors"))
        share /= (folder / "model.safetensors").stat().st_size
        assert f"The weights take {share:.1%} of the source's" in text
        assert content(out) == content(packed[flag])
    assert main(["pack", str(folder), str(tmp_path / "json"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["num_experts"], about["num_lossless"], about["why_floats"]) == (24, 23, "")


def stopped(folder, out, **options):
    """Begin to pack, and stop after some records."""
    partial = out.with_name(out.name + ".partial")

    def stop(done, total):
        if (partial / JOURNAL).is_file() and len((partial / JOURNAL).read_bytes().split()) > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_model(folder, out, progress=stop, **options)
    return partial


@pytest.mark.parametrize("first", [None, True, False])
@pytest.mark.parametrize("then", [None, True, False])
def test_a_stopped_run_is_continued_with_the_same_choice_and_begun_anew_with_another(
    folder, packed, tmp_path, caplog, first, then
):
    partial = stopped(folder, tmp_path / "out", lossless=first)
    assert (partial / JOURNAL).is_file()
    with caplog.at_level("INFO"):
        found = pack_model(folder, tmp_path / "out", lossless=then)
    assert ("continuing" in caplog.text) == ((first is False) == (then is False))
    assert content(found.folder) == content(packed[then is not False])


def test_a_folder_of_a_run_killed_in_its_last_step_is_no_others(folder, packed, tmp_path):
    out = pack_model(folder, tmp_path / "out", lossless=True).folder
    stopped(folder, tmp_path / "again", lossless=None)
    journal = (tmp_path / "again.partial" / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(journal)
    with pytest.raises(ConfigError, match="exists"):
        pack_model(folder, out, lossless=False)
    assert content(pack_model(folder, out).folder) == content(packed[True])


def test_a_packed_folder_is_packed_the_other_way(packed, tmp_path):
    for flag, choices in ((True, (None, True)), (False, (False,))):
        for choice in choices:
            out = pack_model(packed[not flag], tmp_path / f"{choice}", lossless=choice).folder
            assert content(out) == content(packed[flag])


def test_a_folder_that_is_packed_so_already_is_refused(packed, int8, tmp_path):
    for source, choice, match in (
        (packed[True], None, "already, its experts without loss. Copy the folder, or give lossless=False"),
        (packed[True], True, "already, its experts without loss"),
        (packed[False], False, r"already, with its experts as they are \(lossless is off\): copy the folder"),
        (int8, None, r"already, with its experts as they are \(.*in int8 already.*\): copy the folder"),
        (int8, True, "in int8 already.* Leave lossless out"),
    ):
        with pytest.raises(ConfigError, match=match):
            pack_model(source, tmp_path / "out", lossless=choice)
    assert list(tmp_path.iterdir()) == []


def test_a_packed_source_that_changed_is_another_run(packed, tmp_path, caplog):
    source = shutil.copytree(packed[True], tmp_path / "source")
    stopped(source, tmp_path / "out", lossless=False)
    os.utime(source / PACKED_FILE)
    with caplog.at_level("INFO"):
        pack_model(source, tmp_path / "out", lossless=False)
    assert "continuing" not in caplog.text
