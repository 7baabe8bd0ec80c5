"""What a killed build leaves beside the demo model, and what another program put there."""

import json

import pytest

from moeflow.demo.model import build_checkpoint
from moeflow.demo.recipe import Recipe
from moeflow.demo.stages import Stages
from moeflow.errors import DemoModelError


def build(out):
    def load(work):
        raise AssertionError("nothing is loaded")

    return build_checkpoint(load, out, Recipe(), "tiny", 0, Stages(False))


def left(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_that_no_build_wrote_is_left_alone(tmp_path):
    (tmp_path / "demo.partial").mkdir()
    (tmp_path / "demo.partial" / "mine").write_text("mine")
    with pytest.raises(DemoModelError, match="holds something that no build wrote"):
        build(tmp_path / "demo")
    assert left(tmp_path) == ["demo.partial", "demo.partial/mine"]


def test_a_build_that_was_killed_in_its_last_steps_is_cleared_up(tmp_path):
    for folder in ("demo", "demo.partial"):
        (tmp_path / folder).mkdir()
    (tmp_path / "demo" / "demo_model.json").write_text("{}")
    (tmp_path / "demo" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    (tmp_path / "demo.partial" / "layer-0000.safetensors").write_bytes(b"left")
    (tmp_path / "demo.lock").touch()
    before = left(tmp_path / "demo")
    assert build(tmp_path / "demo") == tmp_path / "demo"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert left(tmp_path / "demo") == before
