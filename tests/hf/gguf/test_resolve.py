"""GGUF files where users name a model: which file a name means, and which it cannot mean."""

import pytest

from moeflow.errors import ModelSourceError
from moeflow.hf.gguf.resolve import gguf_folder_of, is_gguf


def test_only_files_of_that_name_are_gguf(tmp_path):
    (tmp_path / "a.GGUF").touch()
    (tmp_path / "b.gguf").mkdir()
    assert is_gguf(tmp_path / "a.GGUF")
    assert not is_gguf(tmp_path / "b.gguf")
    assert not is_gguf(tmp_path / "c.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "experts.moeflow"])
def test_weights_of_ours_win_over_gguf_files_beside_them(name, tmp_path):
    (tmp_path / name).touch()
    (tmp_path / "model.gguf").touch()
    assert gguf_folder_of(tmp_path) == tmp_path


def test_a_folder_without_gguf_files_is_itself(tmp_path):
    assert gguf_folder_of(tmp_path) == tmp_path


def test_a_folder_of_several_models_is_refused_by_their_names(tmp_path):
    for name in ("q4-00001-of-00002.gguf", "q4-00002-of-00002.gguf", "q8.gguf", "mmproj-f16.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelSourceError, match=r"holds 2 GGUF models: q4-00001-of-00002\.gguf, q8\.gguf\. Give"):
        gguf_folder_of(tmp_path)
