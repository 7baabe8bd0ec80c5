"""Packing after kills in any line, beside another run, over damage and other inputs: the same bytes, nothing left."""

import json
import os
from array import array

import numpy as np
import pytest
from safetensors.numpy import save_file

from helpers.forks import in_child
from helpers.kill_points import kill_at_each_line
from moeflow import atomic_file, file_lock
from moeflow.checkpoint import pack_journal, packed_writer
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.checkpoint.layer_source import LayerSource, PieceTable
from moeflow.checkpoint.pack_journal import JOURNAL
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.checkpoint.packed_writer import check_output, write_packed
from moeflow.checkpoint.writing import dense_file
from moeflow.core import LayerLayout, RecordLayout
from moeflow.errors import ConfigError, MoeflowError

LAYERS, EXPERTS, BYTES = 2, 4, 5000
WRITER = (packed_writer, pack_journal, dense_file, atomic_file, file_lock)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of two layers of experts that are bytes, and one dense tensor."""
    folder, noise = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    experts = {f"e{n}": noise.integers(0, 256, (EXPERTS, BYTES), np.uint8) for n in range(LAYERS)}
    save_file({"dense": np.arange(100, dtype=np.float32), **experts}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def write(source, out, *, settings="", progress=None):
    checkpoint = open_checkpoint(source)
    layers = []
    for number in range(LAYERS):
        entry = checkpoint.tensors[f"e{number}"]
        begins = array("Q", [entry.begin + expert * BYTES for expert in range(EXPERTS)])
        table = PieceTable("U8", (BYTES,), BYTES, array("H", [0] * EXPERTS), begins)
        layout = LayerLayout(f"layers.{number}", EXPERTS, RecordLayout.pack([("w", "U8", (BYTES,))]))
        layers.append(LayerSource(layout, ((table, 0),), ()))
    check_output(out)
    return write_packed(checkpoint, layers, set(), out, settings=settings, progress=progress)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return content(write(source, tmp_path_factory.mktemp("whole") / "out"))


def stop_after(share):
    def progress(done, total):
        if done >= share * total:
            raise KeyboardInterrupt

    return progress


def half_done(source, out, share=0.7, **options):
    """Interrupt a run and return its partial folder."""
    with pytest.raises(KeyboardInterrupt):
        write(source, out, progress=stop_after(share), **options)
    return out.with_name("out.partial")


@pytest.mark.slow
def test_killed_in_any_line_the_next_run_ends_with_the_same_bytes(source, whole, tmp_path):
    run = {"folder": tmp_path / "0"}
    run["folder"].mkdir()
    for number, place in enumerate(kill_at_each_line(lambda: write(source, run["folder"] / "out"), *WRITER)):
        if place != "not killed":
            out = run["folder"] / "out"
            if not (out.exists() and not (out / JOURNAL).exists()):  # else it was killed when all was done
                write(source, out)
            assert content(out) == whole, place
            assert [path.name for path in run["folder"].iterdir()] == ["out"], place
        run["folder"] = tmp_path / str(number + 1)
        run["folder"].mkdir()
    assert number > 150


def test_a_second_run_at_the_same_time_is_refused(source, whole, tmp_path):
    """Two runs to one folder, both killed, and a third, which once wrote records of the one under sums of the other."""
    told = []

    def progress(done, total):
        if not told:
            told.append(in_child(lambda: write(source, tmp_path / "out", settings="other")))
            with pytest.raises(ConfigError, match="out is being written by another process"):
                write(source, tmp_path / "out")

    write(source, tmp_path / "out", progress=progress)
    assert told == [1]
    assert content(tmp_path / "out") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_done_is_not_read_again(source, whole, tmp_path):
    half_done(source, tmp_path / "out")
    seen = []
    write(source, tmp_path / "out", progress=lambda done, total: seen.append(done / total))
    assert content(tmp_path / "out") == whole
    assert seen == sorted(seen)
    assert seen[-1] <= 1


@pytest.mark.parametrize("place", [0, 2])
def test_records_that_are_not_as_the_journal_says_are_written_again(source, whole, tmp_path, place):
    partial = half_done(source, tmp_path / "out")
    journal = (partial / JOURNAL).read_text().split("\n")
    assert len(journal) > 5
    with open(partial / PACKED_FILE, "r+b") as file:
        file.seek(4096 + place * 8192 + 10)
        file.write(b"damage")
    write(source, tmp_path / "out")
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda partial: (partial / PACKED_FILE).unlink(),
        lambda partial: os.truncate(partial / PACKED_FILE, 5000),
        lambda partial: os.truncate(partial / JOURNAL, 0),
        lambda partial: os.truncate(partial / JOURNAL, 70),
        lambda partial: (partial / JOURNAL).write_bytes((partial / JOURNAL).read_bytes()[:65] + b"\xff\xfe\nzz\n" * 50),
        lambda partial: (partial / JOURNAL).write_bytes((partial / JOURNAL).read_bytes() + b"00000000\n" * 50),
        lambda partial: (partial / "old.json").write_text("of a file that the checkpoint no longer has"),
    ],
)
def test_a_damaged_partial_folder_ends_in_the_same_bytes(source, whole, tmp_path, damage):
    damage(half_done(source, tmp_path / "out"))
    write(source, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_other_settings_or_other_files_of_the_same_shape_begin_anew(source, whole, tmp_path):
    half_done(source, tmp_path / "out", settings="int4")
    write(source, tmp_path / "out")
    assert content(tmp_path / "out") == whole

    other = tmp_path / "source"
    other.mkdir()
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-EXPERTS * BYTES * 2 :] = bytes(EXPERTS * BYTES * 2)
    (other / "model.safetensors").write_bytes(data)
    (other / "config.json").write_text("{}")
    stat = (source / "model.safetensors").stat()
    os.utime(other / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as archives often set it
    (tmp_path / "two").mkdir()
    half_done(source, tmp_path / "two" / "out")
    found = content(write(other, tmp_path / "two" / "out"))
    assert found == content(write(other, tmp_path / "clean"))
    assert found != whole


def test_a_folder_of_another_program_is_left_alone(source, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        write(source, tmp_path / "out")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / JOURNAL).write_text("of another run\n")
    with pytest.raises(ConfigError, match="exists"):
        write(source, tmp_path / "done")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists"):
        write(source, tmp_path / "link")
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left == {"out.partial", "out.partial/mine", "done", f"done/{JOURNAL}", "link"}


def test_a_place_that_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MoeflowError, match=r"file/out could not be written: (Not a directory|File exists)"):
        write(source, tmp_path / "file" / "out")
    assert json.loads((source / "config.json").read_text()) == {}
