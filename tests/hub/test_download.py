"""Downloads as processes: killed, interrupted, two at once, on a full disk; what the cache holds and is used for."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from huggingface_hub import constants, snapshot_download

from helpers.hub_server import COMMIT, ID, Fault, hub
from helpers.paths import ROOT
from moeflow.errors import ModelSourceError
from moeflow.hub import download as download_module
from moeflow.hub.download import download, fetch_model
from moeflow.hub.partial_file import PIECE_BYTES, PartialFile, bytes_there
from moeflow.hub.repository import Repository
from moeflow.hub.stores import FolderStore

BLOCK_BYTES = 8 << 20
LARGE = "model-1.safetensors"


def start(server, *arguments, file_bytes=None, **environment):
    """Start `moeflow download org/model` with its hub on this machine."""

    def limit():
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen(
        [sys.executable, "-m", "moeflow", "download", ID, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=limit,
    )


def whole(server, folder):
    """Hold each file that has its final name against the hub's; return their names."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and not hidden(path, folder)]
    for name in names:
        assert (folder / name).read_bytes() == server.files[name], f"{name} is not whole"
    return set(names)


def hidden(path, folder):
    """Whether a path is moeflow's own."""
    return path.relative_to(folder).parts[0].startswith(".")


@pytest.mark.slow
def test_a_kill_costs_at_most_one_block(tmp_path):
    draw, to = random.Random(1), tmp_path / "to"
    files = {"config.json": b"{}", **{f"model-{n}.safetensors": draw.randbytes(25_000_000) for n in (1, 2, 3)}}
    with hub(files) as server:
        for _ in range(4):
            at = server.total_sent + draw.randrange(BLOCK_BYTES + 1_000_000, 16_000_000)
            process = start(server, "--to", to)
            server.on_sent = lambda total, at=at, process=process: process.kill() if total >= at else None
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            whole(server, to)
        killed_bytes, server.on_sent = server.total_sent, lambda total: None
        process = start(server, "--to", to, "--json")
        done = json.loads(process.communicate()[0])
        assert process.returncode == 0
        assert whole(server, to) == set(files)
        size = sum(map(len, files.values()))
        assert server.total_sent - size <= 4 * BLOCK_BYTES
        assert done["fetched_bytes"] >= size - killed_bytes
        assert killed_bytes > 4 * BLOCK_BYTES, "more came before each kill than may come twice"


@pytest.mark.slow
def test_two_at_once_fetch_each_byte_once(server, tmp_path):
    second, begun = [], threading.Semaphore()

    def fault(request):
        if request.name == LARGE and request.host == "other" and begun.acquire(blocking=False):
            second.append(start(server, "--to", tmp_path / "to"))
            assert "another process fetches org/model: waiting for it" in second[0].stderr.readline()
        return None

    server.fault = fault
    first = start(server, "--to", tmp_path / "to")
    said = first.communicate()
    assert first.returncode == 0, said
    assert second[0].communicate()[0].endswith("load_moe({!r})\n".format(str(tmp_path / "to")))
    assert server.sent() == 12_000_027
    assert whole(server, tmp_path / "to") >= {LARGE, "model-2.safetensors"}


@pytest.mark.slow
def test_control_c_ends_it_in_one_line_and_the_next_run_goes_on(server, tmp_path):
    came = threading.Event()
    server.on_sent = lambda total: came.set() if total > 5_000_000 else None
    server.fault = lambda request: Fault(drop_after=0) if came.is_set() and request.host == "other" else None
    process = start(server, "--to", tmp_path / "to")
    assert came.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "moeflow: interrupted"
    assert LARGE not in whole(server, tmp_path / "to")
    store, repository = FolderStore(tmp_path / "to"), Repository(ID)
    kept = sum(bytes_there(store.partials, file) for file in repository.wanted_files)
    small = sum(file.size for file in repository.wanted_files if store.has(file, repository.commit))
    server.fault, server.on_sent = lambda request: None, lambda total: None
    done = fetch_model(ID, tmp_path / "to")
    assert done.fetched_bytes == done.num_bytes - kept - small


@pytest.mark.slow
def test_a_disk_that_fills_up_is_told_and_what_was_fetched_is_kept(server, tmp_path):
    limit, store = 2 * PIECE_BYTES, FolderStore(tmp_path / "to")
    (large,) = (file for file in Repository(ID).files if file.name == LARGE)

    def later(request):
        """Bytes that the disk has no room for come when a piece is there."""
        begin = request.headers.get("range", "bytes=0-").partition("=")[2].partition("-")[0]
        while request.name == LARGE and int(begin) >= limit and not bytes_there(store.partials, large):
            time.sleep(0.01)

    server.fault = later
    process = start(server, "--to", tmp_path / "to", file_bytes=limit)
    _, said = process.communicate(timeout=60)
    server.fault = lambda request: None
    assert process.returncode == 1
    assert len([line for line in said.splitlines() if line.startswith("moeflow: ")]) == 1
    assert "cannot be written: File too large. Make room" in said
    assert "Traceback" not in said
    assert LARGE not in whole(server, tmp_path / "to")
    assert fetch_model(ID, tmp_path / "to").fetched_bytes <= 12_000_027 - PIECE_BYTES


def test_a_disk_without_room_is_told_before_anything_is_fetched(server, tmp_path):
    server.listed[LARGE] = {"lfs": {"sha256": "0" * 64, "size": 10**17, "pointerSize": 1}}
    with pytest.raises(ModelSourceError, match=r"needs 90949 TiB more in .* are free.*--to FOLDER"):
        download(ID, tmp_path / "to")
    assert server.sent() == 0


def test_a_disk_without_room_for_a_packed_copy_beside_it_is_told(server, tmp_path, monkeypatch, caplog):
    """Room for the files, and for no second copy of them; a real disk of that size cannot be had everywhere."""
    size = sum(map(server.size, server.files))
    usage = shutil.disk_usage(tmp_path)
    free = size + download_module.SPARE_BYTES + 1000
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: usage._replace(free=free))
    download(ID, tmp_path / "to")
    (told,) = (record.getMessage() for record in caplog.records if "--quantize" in record.getMessage())
    assert "not enough for a packed or quantised copy" in told
    caplog.clear()
    free = 3 * size + download_module.SPARE_BYTES
    download(ID, tmp_path / "again")
    assert not caplog.records


def test_the_cache_is_the_one_that_huggingface_hub_reads(server):
    folder = download(ID)
    assert snapshot_download(ID, local_files_only=True) == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer.json", "empty.txt", LARGE, "model-2.safetensors"
    }  # fmt: skip
    whole(server, folder)
    asked = len(server.requests)
    patterns = [path.name for path in folder.iterdir()]
    assert snapshot_download(ID, allow_patterns=patterns) == str(folder)
    assert not [request for request in server.requests[asked:] if request.sent], "nothing is fetched again"


def test_what_huggingface_hub_fetched_is_not_fetched_again(server):
    folder = snapshot_download(ID, allow_patterns=["*.json", "model-1*"])
    asked = server.sent()
    done = fetch_model(ID)
    assert str(done.folder) == folder
    assert server.sent() - asked == done.fetched_bytes == 3_000_000


@pytest.mark.parametrize("way", ["local_files_only", "offline", "no network", "refused"])
def test_what_is_in_the_cache_is_used_where_the_hub_cannot_be_asked(server, monkeypatch, way):
    folder = download(ID)
    asked = len(server.requests)
    options = {"local_files_only": True} if way == "local_files_only" else {"patience_s": 0}
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif way == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    elif way == "refused":
        server.fault = lambda request: Fault(401)
    assert fetch_model(ID, **options).folder == folder
    assert fetch_model(ID, revision=COMMIT, **options).folder == folder
    if way in ("local_files_only", "offline"):
        assert len(server.requests) == asked
    with pytest.raises(ModelSourceError, match="org/other"):
        fetch_model("org/other", **options)
    if way != "refused":
        with pytest.raises(ModelSourceError, match="at revision v2"):
            fetch_model(ID, revision="v2", **options)


def test_a_revision_that_is_gone_is_not_taken_from_the_cache(server):
    download(ID)
    with pytest.raises(ModelSourceError, match="that revision is not"):
        download(ID, revision="v9")


def test_a_cache_that_lacks_shards_is_refused_offline(server, files):
    weight_map = {"a": LARGE, "b": "model-2.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    snapshot_download(ID, allow_patterns=["*.json", "model-1*"])
    with pytest.raises(ModelSourceError, match=r"lacks 1 of 2 shards in the hub's cache.*moeflow download org/model"):
        fetch_model(ID, local_files_only=True)


def test_a_revision_that_moved_on_fetches_what_changed(server, files, tmp_path, caplog):
    to = tmp_path / "to"
    server.fault = lambda request: Fault(404) if request.headers.get("range", "").startswith("bytes=8388608") else None
    with pytest.raises(ModelSourceError):
        download(ID, to)
    server.fault = lambda request: None
    files[LARGE] = bytes(9_000_000)
    server.commits["main"] = "d" * 40
    assert fetch_model(ID, to).commit == "d" * 40
    assert f"{LARGE} has other content in this revision" in caplog.text
    whole(server, to)
    files["config.json"] = b'{"model_type": "other"}'
    assert fetch_model(ID, to).fetched_bytes == 23
    whole(server, to)


def test_a_file_that_was_damaged_is_fetched_again(server, tmp_path):
    to = tmp_path / "to"
    download(ID, to)
    (to / LARGE).write_bytes(bytes(9_000_000))
    assert fetch_model(ID, to).fetched_bytes == 9_000_000
    assert fetch_model(ID, to, force_download=True).fetched_bytes == 12_000_027
    whole(server, to)


def test_a_partial_file_with_wrong_bytes_begins_again(server, tmp_path, caplog):
    """After a loss of power the journal may name pieces that never reached the disk."""
    to = tmp_path / "to"
    (to / ".moeflow-download").mkdir(parents=True)
    file = next(file for file in Repository(ID).files if file.name == LARGE)
    partial = PartialFile(to / ".moeflow-download", file)
    partial.write(0, bytes(PIECE_BYTES))
    partial.finish(0)
    partial.close()
    download(ID, to)
    assert "it begins again" in caplog.text
    whole(server, to)


def test_gguf_files_of_a_repository_are_told_what_to_do_with(server, files):
    del files[LARGE], files["model-2.safetensors"]
    files["model-q4_k_m.gguf"] = b"GGUF"
    with pytest.raises(ModelSourceError, match=r"but GGUF files: model-q4_k_m\.gguf .*Choose one"):
        download(ID)


def test_other_weights_are_refused_before_anything_is_fetched(server, files):
    del files[LARGE], files["model-2.safetensors"]
    with pytest.raises(ModelSourceError, match=r"no safetensors weights, only others \(pytorch_model.bin\)"):
        download(ID)
    assert server.sent() == 0


@pytest.mark.parametrize("revision", ["../x", "/x", "a/../../b"])
def test_a_revision_cannot_lead_out_of_the_cache(server, revision):
    with pytest.raises(ModelSourceError):
        fetch_model(ID, revision=revision, local_files_only=True)


def test_a_folder_that_is_a_file_is_told(server, tmp_path):
    (tmp_path / "to").write_text("a file")
    with pytest.raises(ModelSourceError, match="cannot be written"):
        download(ID, tmp_path / "to")
