"""Doctor reads all of a GGUF file: what its headers say, and the values of its blocks."""

import json
import shutil

import numpy as np
import pytest

from moeflow.cli.main import main
from moeflow.doctor.check_model import check_model
from moeflow.doctor.finding import BROKEN, FINE, works
from moeflow.hf.gguf.resolve import gguf_folder_of
from moeflow.hf.model_folder import ModelFolder


def check(folder):
    return check_model(folder, lambda share, text: None)


@pytest.fixture
def file(gguf_file, tmp_path):
    return shutil.copytree(gguf_file.parent, tmp_path / "model") / gguf_file.name


def test_a_file_that_is_well_is_read_and_tried(file):
    found = check(gguf_folder_of(file))
    assert works(found), found
    levels = {one.name: one.level for one in found}
    assert levels == dict.fromkeys(("config", "GGUF", "values", "tokenizer", "chat template", "trial"), FINE)


def test_a_scale_that_is_no_number_is_told_with_its_layer_and_expert(file):
    folder = gguf_folder_of(file)
    entry = ModelFolder(folder).checkpoint.tensors["blk.1.ffn_gate_exps.weight"]
    with file.open("r+b") as handle:
        handle.seek(entry.begin + 4 * entry.num_bytes // 6 + 144)  # the second block of expert 4
        handle.write(np.array(np.nan, "<f2").tobytes())
    (bad,) = [one for one in check(folder) if one.name == "values"]
    assert bad.level == BROKEN
    assert bad.found == "small.gguf: layer 1, expert 4, blk.1.ffn_gate_exps.weight: 256 NaN"


def test_a_file_that_ends_early_is_told(file):
    folder = gguf_folder_of(file)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 100)
    (bad,) = [one for one in check(folder) if one.name == "GGUF"]
    assert bad.level == BROKEN


def test_the_command_looks_at_the_disk_of_the_file(file, capsys):
    for model in (file, file.parent):
        assert main(["doctor", str(model), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["findings"]
        (disk,) = [one for one in found if one["name"] == "model's disk"]
        assert disk["found"].startswith(f"{file.parent} on ")
