"""`moeflow gguf`, from its arguments to its one line."""

import json

import pytest

from helpers.gguf_families import ReadBack, gguf_families, save_family
from moeflow.cli.gguf import EXPERT_KINDS, KINDS
from moeflow.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "model"
    save_family(gguf_families()["qwen3moe"], folder)
    return folder


def test_a_file_is_written_and_told(folder, tmp_path, capsys):
    out = tmp_path / "model.gguf"
    assert main(["gguf", str(folder), "-o", str(out), "--type", "q8_0", "--pre", "qwen2"]) == 0
    assert f"wrote {out}, {out.stat().st_size:,} bytes: 39 tensors, architecture qwen3moe" in capsys.readouterr().out
    back = ReadBack(out)
    assert back.metadata["general.architecture"] == "qwen3moe"
    assert back.metadata["tokenizer.ggml.pre"] == "qwen2"
    assert back.kinds["blk.0.attn_q.weight"] == "Q8_0"


def test_json_names_the_file(folder, tmp_path, capsys):
    out = tmp_path / "model.gguf"
    assert main(["gguf", str(folder), "-o", str(out), "--experts", "q4_0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "file": str(out),
        "architecture": "qwen3moe",
        "num_tensors": 39,
        "num_bytes": out.stat().st_size,
    }


def test_an_error_is_one_line(folder, tmp_path, capsys):
    assert main(["gguf", str(folder), "-o", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_types_offered_are_those_written():
    from moeflow.convert import gguf

    assert (tuple(gguf.KINDS), tuple(gguf.EXPERT_KINDS)) == (KINDS, EXPERT_KINDS)
