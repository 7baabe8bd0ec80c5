"""Models that are quantised while they come: the bytes of quantising a folder, room for few shards, all ends."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.forks import in_child
from helpers.full_disk import with_full_disk
from helpers.hub_server import ID, Fault
from helpers.kill_points import kill_at_each_line
from helpers.paths import ROOT
from helpers.sharded_models import reshard, straddling
from helpers.small_models import tiny_mixtral
from helpers.written_folders import content, names_in, on_disk
from moeflow import load_moe
from moeflow.checkpoint import pack_journal, packed_writer
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.checkpoint.writing import dense_file
from moeflow.convert.download_quantized import download_quantized
from moeflow.convert.quantize import quantize_model
from moeflow.errors import ConfigError, ModelSourceError, MoeflowError
from moeflow.hub import passing_shards

MB = 1 << 20
FIVE = [f"model-{number:05}.safetensors" for number in range(1, 6)]


def test_it_writes_what_quantising_the_folder_writes_and_leaves_nothing_else(model, expected, serve, tmp_path):
    server = serve(model)
    done = download_quantized(ID, tmp_path / "to" / "out", "int4")
    assert content(tmp_path / "to" / "out") == expected["model"]
    assert names_in(tmp_path / "to") == ["out"]
    assert done.written.formats == {"int4-g64": 24}
    assert done.fetched_bytes == sum(map(server.size, server.files))
    loaded = load_moe(tmp_path / "to" / "out")
    with torch.no_grad(), loaded.moeflow:
        assert torch.isfinite(loaded(torch.arange(1, 12).unsqueeze(0)).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_families_of_other_layouts_are_the_same_bytes_too(name, serve, tmp_path):
    build_model(FAMILIES[name]).save_pretrained(tmp_path / "one")
    folder = reshard(tmp_path / "one", tmp_path / "model", straddling)
    serve(folder)
    download_quantized(ID, tmp_path / "out", "int3-g32", method="rtn")
    assert content(tmp_path / "out") == content(
        quantize_model(folder, tmp_path / "expected", "int3-g32", method="rtn").folder
    )


def test_a_model_of_one_shard_comes_too(serve, tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors.index.json").exists()
    serve(tmp_path / "model")
    download_quantized(ID, tmp_path / "out", "int8", method="rtn")
    written = quantize_model(tmp_path / "model", tmp_path / "expected", "int8", method="rtn").folder
    assert content(tmp_path / "out") == content(written)


def test_the_disk_holds_what_is_written_and_two_shards_at_most(large, expected, serve, tmp_path):
    server, seen, most = serve(large), [], 0

    def progress(done, total):
        nonlocal most
        most = max(most, on_disk(tmp_path))
        seen.append((done, total))
        assert threading.current_thread() is threading.main_thread()

    download_quantized(ID, tmp_path / "out", "int8", method="rtn", progress=progress)
    assert content(tmp_path / "out") == expected["large"]
    written, shards = sum(map(len, expected["large"].values())), sorted(map(server.size, FIVE))
    assert most <= written + shards[-1] + shards[-2] + MB
    assert most < sum(shards), "less than the checkpoint alone"
    assert seen == sorted(seen)
    assert seen[-1] == (sum(shards), sum(shards))


@pytest.mark.slow
def test_a_kill_costs_8_mb_at_most_and_no_dropped_shard_comes_again(large, expected, serve, tmp_path):
    server, draw, kills, out = serve(large), random.Random(2), 3, tmp_path / "out"
    size = sum(map(server.size, server.files))
    written = sum(map(len, expected["large"].values()))
    for kill in range(kills):
        at = (kill + 1) * size // (kills + 1) + draw.randrange(2 * MB)

        def progress(done, total, at=at):
            assert on_disk(tmp_path) <= written + 2 * max(map(server.size, FIVE)) + MB
            if done >= at:
                os.kill(os.getpid(), signal.SIGKILL)

        call = lambda: download_quantized(ID, out, "int8", method="rtn", progress=progress)  # noqa: E731
        assert in_child(call) == -signal.SIGKILL
        assert names_in(tmp_path) == ["out.download", "out.download.lock", "out.lock", "out.partial"]
    came = {name: server.sent(name) for name in FIVE}
    begun = [name for name in FIVE if list(blob(tmp_path, server, name).parent.glob(f"{server.sha256(name)}*"))]
    dropped = [name for name in FIVE if came[name] >= server.size(name) and name not in begun]
    assert dropped
    download_quantized(ID, out, "int8", method="rtn")
    assert content(out) == expected["large"]
    assert {name: server.sent(name) for name in dropped} == {name: came[name] for name in dropped}
    assert server.sent() - size <= kills * 8 * MB + len(FIVE) * (64 << 10)
    assert names_in(tmp_path) == ["out"]


def blob(folder, server, name):
    return folder / "out.download" / "models--org--model" / "blobs" / server.sha256(name)


@pytest.mark.slow
def test_killed_in_any_line_the_next_run_ends_with_the_same_bytes(model, serve, tmp_path):
    serve(model)
    whole = content(quantize_model(model, tmp_path / "expected", "int8", method="rtn").folder)
    run = {"folder": tmp_path / "0"}
    run["folder"].mkdir()

    def write():
        download_quantized(ID, run["folder"] / "out", "int8", method="rtn")

    writer = (passing_shards, packed_writer, pack_journal, dense_file)
    for number, place in enumerate(kill_at_each_line(write, *writer, every=12)):
        out = run["folder"] / "out"
        if place != "not killed" and not (out.exists() and not (out / pack_journal.JOURNAL).exists()):
            write()
        assert content(out) == whole, place
        assert names_in(run["folder"]) == ["out"], place
        run["folder"] = tmp_path / str(number + 1)
        run["folder"].mkdir()
    assert number > 20


def interrupt(out, share, **options):
    """Stop a run when this share of the shards came."""

    def progress(done, total):
        if done >= share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_quantized(ID, out, "int4", progress=progress, **options)


@pytest.mark.parametrize("file", [PACKED_FILE, "model.safetensors"])
def test_a_damaged_record_or_tensor_of_a_dropped_shard_brings_that_shard_again(model, expected, serve, tmp_path, file):
    server = serve(model)
    interrupt(tmp_path / "out", 1)
    came = server.sent()
    with open(tmp_path / "out.partial" / file, "r+b") as damaged:
        size = os.path.getsize(damaged.name)
        for place in range(4096, size, 4096):
            damaged.seek(place)
            damaged.write(b"damage")
    download_quantized(ID, tmp_path / "out", "int4")
    assert content(tmp_path / "out") == expected["model"]
    assert server.sent() > came


def test_an_interrupted_run_goes_on_where_it_was(model, expected, serve, tmp_path):
    server = serve(model)
    interrupt(tmp_path / "out", 0.6)
    download_quantized(ID, tmp_path / "out", "int4")
    assert content(tmp_path / "out") == expected["model"]
    assert server.sent() <= sum(map(server.size, server.files)) + 5 * (64 << 10)


def test_a_file_that_changes_at_the_server_is_refused_and_the_next_run_goes_on(model, expected, serve, tmp_path):
    server = serve(model)
    other = Fault(content=bytes(server.size(FIVE[2])))
    heads = []

    def fault(request):
        if (request.host, request.name) != ("other", FIVE[2]):
            return None
        heads.append(request)
        return other if len(heads) > 1 else None  # the header comes as it is

    server.fault = fault
    with pytest.raises(ModelSourceError, match="not the file that the repository lists"):
        download_quantized(ID, tmp_path / "out", "int4")
    assert names_in(tmp_path) == ["out.download", "out.partial"]
    server.fault = lambda request: None
    download_quantized(ID, tmp_path / "out", "int4")
    assert content(tmp_path / "out") == expected["model"]


def test_a_header_that_is_not_the_shards_is_refused_and_read_again(model, expected, serve, tmp_path):
    server = serve(model)
    interrupt(tmp_path / "out", 0)
    head = tmp_path / "out.download" / "heads" / f"{server.sha256(FIVE[1])}.head"
    head.write_bytes(head.read_bytes().replace(b'"format":"pt"', b'"format":"pu"'))
    with pytest.raises(ModelSourceError, match=f"header of {FIVE[1]} of org/model is another"):
        download_quantized(ID, tmp_path / "out", "int4")
    download_quantized(ID, tmp_path / "out", "int4")
    assert content(tmp_path / "out") == expected["model"]


def test_another_commit_of_the_repository_begins_what_changed_again(model, serve, tmp_path, caplog):
    server = serve(model)
    interrupt(tmp_path / "out", 0.6)
    folder = shutil.copytree(model, tmp_path / "model")
    data = bytearray((folder / FIVE[0]).read_bytes())
    data[-4000:] = bytes(4000)
    (folder / FIVE[0]).write_bytes(data)
    server.files[FIVE[0]] = folder / FIVE[0]
    server.commits["main"] = "d" * 40
    assert download_quantized(ID, tmp_path / "out", "int4").commit == "d" * 40
    assert "is at another commit than when it was begun" in caplog.text
    assert content(tmp_path / "out") == content(quantize_model(folder, tmp_path / "expected", "int4").folder)


@pytest.mark.parametrize("file_bytes", [300_000, 500_000])
def test_a_disk_that_fills_up_is_told_and_the_next_run_goes_on(model, expected, serve, tmp_path, file_bytes):
    serve(model)

    def refused():
        with pytest.raises(MoeflowError, match=r"(cannot|could not) be written: File too large"):
            download_quantized(ID, tmp_path / "out", "int4")

    assert with_full_disk(file_bytes, refused) == 0
    download_quantized(ID, tmp_path / "out", "int4")
    assert content(tmp_path / "out") == expected["model"]
    assert names_in(tmp_path) == ["out"]


def test_a_disk_without_room_is_told_before_a_shard_is_fetched(model, serve, tmp_path, monkeypatch):
    server = serve(model)
    usage = namedtuple("usage", "total used free")(0, 0, 65 * MB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelSourceError, match=r"needs .* KiB more in .* for what is written, and 65\.\d MiB for the"):
        download_quantized(ID, tmp_path / "out", "int4")
    assert all(server.sent(name) <= 64 << 10 for name in FIVE)
    assert names_in(tmp_path) == []


def test_where_there_is_no_room_for_a_shard_ahead_none_comes_ahead(large, serve, tmp_path, monkeypatch):
    server = serve(large)
    size = max(map(server.size, FIVE))
    free = passing_shards.SPARE_BYTES + sum(map(server.size, FIVE)) // 2 + 3 * size // 2 + 2 * MB
    most = 0

    def progress(done, total):
        nonlocal most
        most = max(most, on_disk(tmp_path / "out.download"))

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free))
    download_quantized(ID, tmp_path / "out", "int8", method="rtn", progress=progress)
    assert most <= size + MB


def test_a_second_process_is_refused(model, expected, serve, tmp_path):
    serve(model)
    told = []

    def progress(done, total):
        if not told:
            told.append(in_child(lambda: download_quantized(ID, tmp_path / "out", "int4")))
            with pytest.raises(ConfigError, match="out is being written by another process"):
                download_quantized(ID, tmp_path / "out", "int8")

    download_quantized(ID, tmp_path / "out", "int4", progress=progress)
    assert told == [1]
    assert content(tmp_path / "out") == expected["model"]


@pytest.mark.slow
def test_control_c_ends_the_command_in_one_line_and_the_next_run_tells_what_it_wrote(model, expected, serve, tmp_path):
    server = serve(model)
    came = threading.Event()
    server.fault = lambda request: Fault(drop_after=0) if came.is_set() and request.host == "other" else None
    server.on_sent = lambda total: came.set() if total > 1_000_000 else None
    command = [sys.executable, "-m", "moeflow", "download", ID, "--quantize", "int4", "--to", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": server.url}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert came.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    server.fault, server.on_sent = lambda request: None, lambda total: None
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "moeflow: interrupted"
    assert "fetching org/model: " in said
    run = subprocess.run([*command, "--json"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["folder"] == str(tmp_path / "out")
    assert told["formats"] == {"int4-g64": 24}
    assert told["fetched_bytes"] < sum(map(server.size, server.files))
    assert content(tmp_path / "out") == expected["model"]
