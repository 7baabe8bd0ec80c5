"""Which files of a repository are fetched: one GGUF file of several with what is beside it, or safetensors."""

import random

import pytest

from helpers.hub_server import ID, Fault
from moeflow.errors import ModelSourceError
from moeflow.hub.download import fetch_model

SPLITS = [f"Q8_0/m-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
BESIDE = {"config.json": b"{}", "README.md": b"# a model"}
GGUF = {
    "m-Q4_K_M.gguf": random.Random(0).randbytes(9_000_000),
    "m-Q2_K.gguf": random.Random(1).randbytes(5000),
    "mmproj-m-F16.gguf": b"an encoder",
    **{name: random.Random(name).randbytes(6000) for name in SPLITS},
}


@pytest.fixture
def files():
    return {**BESIDE, **GGUF}


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_of_the_weights_only_the_chosen_file_is_fetched(server):
    found = fetch_model(ID, gguf_file="m-Q4_K_M.gguf")
    assert names(found.folder) == {"config.json", "m-Q4_K_M.gguf"}
    assert (found.folder / "m-Q4_K_M.gguf").read_bytes() == server.files["m-Q4_K_M.gguf"]
    assert server.sent() == found.num_bytes == found.fetched_bytes == 9_000_002


@pytest.mark.parametrize("name", SPLITS)
def test_any_split_brings_all_of_them(server, name):
    assert names(fetch_model(ID, gguf_file=name).folder) == {"config.json", *SPLITS}


def test_a_download_that_broke_goes_on(server, tmp_path):
    to = tmp_path / "to"
    server.fault = lambda request: Fault(403) if "bytes=8388608" in request.headers.get("range", "") else None
    with pytest.raises(ModelSourceError, match="403"):
        fetch_model(ID, to, gguf_file="m-Q4_K_M.gguf")
    assert not (to / "m-Q4_K_M.gguf").exists()
    server.fault = lambda request: None
    assert 0 < fetch_model(ID, to, gguf_file="m-Q4_K_M.gguf").fetched_bytes < 9_000_000
    assert (to / "m-Q4_K_M.gguf").read_bytes() == server.files["m-Q4_K_M.gguf"]


def test_a_second_quantisation_comes_beside_the_first(server, tmp_path):
    for name in ("m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf"):
        found = fetch_model(ID, tmp_path / "to", gguf_file=name)
    assert found.fetched_bytes == 0
    assert {"m-Q2_K.gguf", "m-Q4_K_M.gguf"} < names(tmp_path / "to")


def test_without_a_choice_the_files_are_listed_the_largest_first(server):
    listed = r"m-Q4_K_M.gguf \(8.6 MiB\), Q8_0/m-Q8_0-00001-of-00003.gguf \(17.6 KiB\), m-Q2_K.gguf \(4.9 KiB\)\."
    with pytest.raises(ModelSourceError, match=listed):
        fetch_model(ID)
    with pytest.raises(ModelSourceError, match=r"no GGUF file 'm-Q5_K_M.gguf'. It has m-Q4_K_M.gguf \(8.6 MiB\), "):
        fetch_model(ID, gguf_file="m-Q5_K_M.gguf")
    assert server.sent() == 0


def test_a_split_that_the_repository_lacks_is_named(server):
    del server.files[SPLITS[1]]
    with pytest.raises(ModelSourceError, match=f"lacks 1 of 3 splits of .*, the first is .*{SPLITS[1]}"):
        fetch_model(ID, gguf_file=SPLITS[0])


def test_the_cache_serves_what_it_has_and_refuses_the_rest(server):
    fetch_model(ID, gguf_file=SPLITS[0])
    found = fetch_model(ID, gguf_file=SPLITS[2], local_files_only=True)
    assert names(found.folder) == {"config.json", *SPLITS}
    with pytest.raises(ModelSourceError, match=r"no GGUF file 'm-Q2_K.gguf'.*It has Q8_0/m-Q8_0-00001.*local_files"):
        fetch_model(ID, gguf_file="m-Q2_K.gguf", local_files_only=True)
    with pytest.raises(ModelSourceError, match=r"no safetensors weights, but GGUF files: Q8_0/m-Q8_0-00001"):
        fetch_model(ID, local_files_only=True)
    (found.folder / SPLITS[1]).unlink()
    with pytest.raises(ModelSourceError, match=f"lacks 1 of 3 splits.*{SPLITS[1]}"):
        fetch_model(ID, gguf_file=SPLITS[0], local_files_only=True)


def test_without_weights_comes_all_beside_them(server):
    server.files["model.safetensors"] = b"weights"
    assert names(fetch_model(ID, weights=False).folder) == {"config.json"}
    assert names(fetch_model(ID, weights=False, local_files_only=True).folder) == {"config.json"}


def test_safetensors_win_where_nothing_is_chosen(server):
    server.files["model.safetensors"] = b"weights"
    assert names(fetch_model(ID).folder) == {"config.json", "model.safetensors"}


def test_a_repository_of_other_weights_is_refused(server):
    for name in GGUF:
        del server.files[name]
    server.files["pytorch_model.bin"] = b"a pickle"
    with pytest.raises(ModelSourceError, match=r"only others .*pytorch_model\.bin"):
        fetch_model(ID)
    with pytest.raises(ModelSourceError, match="It has none at all: leave gguf_file out"):
        fetch_model(ID, gguf_file="m.gguf")
