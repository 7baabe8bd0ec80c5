"""Files appear whole or not at all: killed at each line, on a full disk, beside another writer, through links."""

import os
import stat
import threading

import numpy as np
import pytest

from helpers.full_disk import with_full_disk
from helpers.kill_points import kill_at_each_line
from moeflow import atomic_file as module
from moeflow import file_lock
from moeflow.atomic_file import atomic_file, check_target, write_atomically
from moeflow.errors import PlacementError, TraceError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    write_atomically(tmp_path / "a", b"one")
    os.chmod(tmp_path / "a", 0o640)
    write_atomically(tmp_path / "a", "zwölf")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "zwölf"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert names(tmp_path) == ["a"]


def test_a_new_file_has_the_permissions_that_the_user_gives_new_files(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_file(tmp_path / "a") as partial:
        partial.touch(mode=0o600)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path):
    write_atomically(tmp_path / "a", b"one")

    def write_half():
        with atomic_file(tmp_path / "a") as partial:
            partial.write_bytes(b"tw")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert ((tmp_path / "a").read_bytes(), names(tmp_path)) == (b"one", ["a"])


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    write_atomically(tmp_path / "link", b"one")
    assert (tmp_path / "link").is_symlink()
    assert ((tmp_path / "folder" / "a").read_bytes(), names(tmp_path / "folder")) == (b"one", ["a"])
    for path in (tmp_path / "link", tmp_path / "b", os.devnull):
        check_target(path)
    write_atomically(os.devnull, b"one")
    assert not os.path.isfile(os.devnull)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "Is a directory. Give the name of a file."),
        ("absent/a", "No such file or directory. Make the folder .*absent first"),
        ("file/a", "Not a directory. Give a file in a folder of yours."),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(tmp_path, path, message):
    (tmp_path / "file").touch()
    with pytest.raises(PlacementError, match=rf"{path} cannot be written: {message}"):
        write_atomically(tmp_path / path, b"one", PlacementError)
    if len(path) < 200:
        with pytest.raises(PlacementError, match=rf"{path} cannot be written: {message}"):
            check_target(tmp_path / path, PlacementError)
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_named_and_nothing_stays(tmp_path):
    if os.path.exists("/dev/full"):
        with pytest.raises(TraceError, match=r"No space left on device\. Make room"):
            write_atomically("/dev/full", b"one", TraceError)

    def write():
        with pytest.raises(TraceError, match=r"cannot be written: File too large\. Make room"):
            write_atomically(tmp_path / "a", bytes(2000), TraceError)

    write_atomically(tmp_path / "a", b"one")
    assert with_full_disk(1000, write) == 0
    assert ((tmp_path / "a").read_bytes(), names(tmp_path)) == (b"one", ["a"])


def test_writers_take_turns(tmp_path):
    """Each writes in many small steps; the file that stays is one writer's alone, and no other file stays."""

    def write(letter):
        with atomic_file(tmp_path / "a") as partial, open(partial, "wb", buffering=0) as file:
            for _ in range(300):
                file.write(letter)

    threads = [threading.Thread(target=write, args=(bytes([65 + n]),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "a").read_bytes()
    assert (len(content), len(set(content)), names(tmp_path)) == (300, 1, ["a"])


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, b"old"])
def test_killed_at_any_line_the_file_is_old_or_new_and_the_next_run_clears_up(tmp_path, before):
    target = tmp_path / "a"

    def write():
        write_atomically(target, b"new" * 1000)

    seen = set()
    for place in kill_at_each_line(write, module, file_lock):
        left = target.read_bytes() if target.exists() else None
        assert left in (before, b"new" * 1000), place
        seen.add(left)
        write()
        assert (target.read_bytes(), names(tmp_path)) == (b"new" * 1000, ["a"]), place
        target.unlink()
        if before is not None:
            target.write_bytes(before)
    assert len(seen) == 2


def write_plan_file(path):
    from moeflow.placement.files.plan import write_plan
    from moeflow.placement.plan import Plan

    write_plan(path, Plan.of_gpus(2, np.array([[0, 1, 0, 1]])), {"seed": 1})


def convert_lines(path):
    from moeflow.trace.convert import convert_trace

    lines = path.with_name("source.jsonl")
    lines.write_text('{"tok": 1, "layers": [[6, 8], [7, 16]]}\n')
    if path.exists():  # it never replaces a trace
        path.unlink()
    convert_trace(lines, path)
    lines.unlink()


def forget_lines(path):
    from moeflow.batch.results import BatchFile

    if not path.exists():
        path.write_text('{"id": "a", "line": 1, "error": "x"}\n{"id": "b", "line": 2, "error": "x"}\n')
    with BatchFile(path) as file:
        file.forget({"a"} & set(file.finished))


def save_conversation(path):
    from moeflow.chat.conversation import Conversation

    Conversation("be brief", [{"role": "user", "content": "hello"}]).save(path)


def save_popularity(path):
    from moeflow.predictors.files import save_predictor
    from moeflow.predictors.popularity import Popularity

    save_predictor(Popularity(2, 4, np.ones((2, 4))), path, fingerprint="f", top_k=2)


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_plan_file, convert_lines, forget_lines, save_conversation, save_popularity])
def test_every_writer_killed_on_the_way_ends_the_next_time_with_the_same_bytes(tmp_path, write):
    """Killed at each of the writing lines: those of the block between, where the content is made, are not tried."""
    target = tmp_path / "a"
    write(target)
    whole = target.read_bytes()
    target.unlink()
    for place in kill_at_each_line(lambda: write(target), module):
        write(target)
        if names(tmp_path) != ["a"]:  # a converter's source, or a lock that a run which has nothing to write leaves
            assert write in (convert_lines, forget_lines), place
        assert target.read_bytes() == whole, place
        for path in tmp_path.iterdir():
            path.unlink()
