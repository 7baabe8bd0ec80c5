"""Headers of a repository: the same tables as of its folder, from few and small requests."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from helpers.hub_server import ID, Fault, hub
from helpers.large_checkpoint import write_large_checkpoint
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.errors import CheckpointError, ModelSourceError
from moeflow.hub.headers import remote_checkpoint
from moeflow.hub.repository import Repository


def shard(**tensors):
    """A safetensors file with tensors of so many float32 values."""
    return save({name: np.zeros(count, np.float32) for name, count in tensors.items()})


@pytest.fixture
def files(files):
    index = {"metadata": {"dtype": "float16"}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    return {
        **files,
        "model-1.safetensors": shard(a=100_000),
        "model-2.safetensors": shard(b=5),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def test_tables_are_those_of_the_folder(server, files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    expected, found = open_checkpoint(tmp_path), remote_checkpoint(Repository(ID))
    assert found.tensors == expected.tensors
    assert found.dtype == expected.dtype == "float16"
    assert [file.name for file in found.files] == [file.name for file in expected.files]
    assert server.sent("model-1.safetensors") <= 64 << 10


def test_small_files_lie_in_a_folder_for_as_long_as_the_repository_lives(server, files):
    repository = Repository(ID)
    folder = remote_checkpoint(repository).folder
    assert (folder / "config.json").read_bytes() == files["config.json"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "empty.txt", "model.safetensors.index.json", "tokenizer.json"
    ]  # fmt: skip
    del repository
    assert not folder.exists()


def test_a_header_that_is_longer_than_guessed_is_read_on(server, files):
    content = shard(**{f"a tensor with the number {number}": 1 for number in range(2000)})
    assert int.from_bytes(content[:8], "little") > 128 << 10
    del files["model.safetensors.index.json"]
    server.files = {"model.safetensors": content, "config.json": b"{}"}
    assert len(remote_checkpoint(Repository(ID)).tensors) == 2000
    assert server.sent("model.safetensors") == 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model-2.safetensors", shard(b=5)[:-4], "org/model/model-2.safetensors is truncated"),
        ("model-2.safetensors", b"\xff" * 100, "truncated or not a safetensors file"),
        ("model-2.safetensors", b"", "truncated or not a safetensors file"),
        ("model-2.safetensors", shard(c=5), "tensor 'b' is not in model-2.safetensors"),
        ("model-2.safetensors", None, "1 of 2 shards are not in the repository.*model-2"),
        ("model.safetensors.index.json", b"{", "is not a safetensors index"),
        ("model.safetensors.index.json", None, "neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_what_is_wrong_is_named(server, name, content, said):
    server.files = {**server.files, name: content}
    if content is None:
        del server.files[name]
    with pytest.raises(CheckpointError, match=said):
        remote_checkpoint(Repository(ID))


def test_a_shard_that_is_refused_ends_it(server):
    server.fault = lambda request: Fault(403) if request.name == "model-1.safetensors" else None
    with pytest.raises(ModelSourceError, match=r"model-1\.safetensors of org/model"):
        remote_checkpoint(Repository(ID))


@pytest.mark.slow
def test_163_shards_take_few_requests_of_which_several_are_in_flight(server, tmp_path):
    """At 50 ms each, one after another would take 25 s."""
    write_large_checkpoint(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    with hub({name: tmp_path / name for name in names}) as large:
        large._digests = {(name, tmp_path / name): "0" * 64 for name in names}
        repository = Repository(ID, endpoint=large.url)
        found = remote_checkpoint(repository)
        assert found.tensors == open_checkpoint(tmp_path).tensors
        assert len([request for request in large.requests if request.host == "other"]) == 163 + 1
        assert large.sent() < 30_000_000
        assert large.most_at_once > 1
