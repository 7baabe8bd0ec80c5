"""Downloads that quantise and are refused: before anything is asked for, or from headers alone; nothing is left."""

import pytest

from helpers.hub_server import ID
from helpers.prequantized_checkpoints import fp8_quantiser, is_linear, make, tiny_model
from helpers.prequantized_models import FP8
from helpers.written_folders import names_in
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.cli.main import main
from moeflow.convert.download_quantized import download_quantized
from moeflow.errors import ConfigError, ModelSourceError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quantize", "int4"], "name it with --to"),
        (["--quantize", "int4", "--to", "out", "--gguf-file", "a.gguf"], "--quantize is for safetensors"),
        (["--quantize", "int4", "--to", "out", "--force"], "--force fetches again what is there"),
        (["--quantize", "int5", "--to", "out"], "not a weight format"),
        (["--quantize", "mxfp4", "--to", "out"], "cannot be quantised to mxfp4"),
        (["--quantize", "lossless", "--to", "out"], "moeflow download, moeflow pack"),
        (["--quantize", "int4", "--to", "there"], "there exists"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked_for(
    model, serve, tmp_path, monkeypatch, capsys, arguments, said
):
    server = serve(model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert main(["download", ID, *arguments]) == 1
    assert said in capsys.readouterr().err
    assert not server.requests
    assert names_in(tmp_path) == ["there"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model-Q4_K_M.gguf": b"GGUF"}, r"has GGUF files alone.*--gguf-file NAME, of model-Q4_K_M\.gguf"),
        ({"model.safetensors": b"x", PACKED_FILE: b"x"}, r"one packed file.*moeflow download, moeflow quantize"),
        ({"pytorch_model.bin": b"x"}, "no safetensors weights, only others"),
    ],
)
def test_repositories_without_shards_of_floats_are_refused(serve, tmp_path, files, said):
    (tmp_path / "repository").mkdir()
    for name, data in {"config.json": b"{}", **files}.items():
        (tmp_path / "repository" / name).write_bytes(data)
    server = serve(tmp_path / "repository")
    with pytest.raises(ModelSourceError, match=said):
        download_quantized(ID, tmp_path / "out", "int4")
    assert server.sent() == 0
    assert names_in(tmp_path) == ["repository"]


def test_experts_that_are_quantised_already_are_refused_from_their_headers(serve, tmp_path):
    quantised, _, _ = make(tmp_path, tiny_model("mixtral", 128, 256), FP8, fp8_quantiser(), is_linear)
    server = serve(quantised)
    with pytest.raises(ConfigError, match="already"):
        download_quantized(ID, tmp_path / "out", "int4")
    assert not (tmp_path / "out.download").exists()
    assert max(request.end for request in server.requests if request.name.endswith(".safetensors")) <= 64 << 10


def test_a_folder_in_the_way_is_left_alone(model, serve, tmp_path):
    serve(model)
    (tmp_path / "out.download").mkdir()
    (tmp_path / "out.download" / "mine").touch()
    with pytest.raises(ModelSourceError, match=r"out\.download is in the way"):
        download_quantized(ID, tmp_path / "out", "int4")
    assert names_in(tmp_path / "out.download") == ["mine"]
