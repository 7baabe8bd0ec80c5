"""What leaves memory comes back from the disk: the same tokens, only what is new is computed, nothing is left."""

import gc
import logging
import os
import threading

import pytest

from helpers.engine_requests import GREEDY, NEW, POSITION_BYTES, assert_empty, generated, tokens
from helpers.full_disk import with_full_disk
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.kv_cache.disk.run_file import CopiedPiece, LeavingRun, write_run
from moeflow.errors import ConfigError, MoeflowError

FIRST, OTHER = tokens(50, 1), tokens(60, 2)
ROOM = 100 * POSITION_BYTES  # more than either conversation, less than both


def written(engine):
    """Wait until all that was given to the writer is on the disk, and return the figures."""
    engine._memory.disk.writer.waiting.join()
    return engine.stats()["kept_disk"]


def answer(engine, model, prompt):
    (completion,) = engine.generate([prompt], GREEDY)
    assert completion.token_ids == generated(model, prompt)
    assert_empty(engine)
    return completion


def leave(engine, model):
    """Let the first conversation be answered, written and dropped; return its next turn."""
    first = answer(engine, model, FIRST)
    assert written(engine)["files"] == 1
    answer(engine, model, OTHER)
    assert engine.stats()["kv_kept_tokens"] <= 100
    return [*FIRST, *first.token_ids, 7, 8]


def run_files(folder):
    return sorted(one.relative_to(folder) for one in folder.glob("*/*.run"))


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "moeflow-kept"]


def test_a_conversation_that_was_dropped_comes_back_and_only_what_is_new_is_computed(mixtral, tmp_path):
    found = {}
    for folder in (None, tmp_path):
        with Engine(mixtral, kv_memory=ROOM, kept_folder=folder) as engine:
            if folder is None:
                turn = [*FIRST, *answer(engine, mixtral, FIRST).token_ids, 7, 8]
                answer(engine, mixtral, OTHER)
            else:
                assert leave(engine, mixtral) == turn
            found[folder] = answer(engine, mixtral, turn).cached_tokens
            stats = engine.stats()
            assert stats["kv_peak_bytes"] <= ROOM
    assert found[None] < len(FIRST) < found[tmp_path] == len(FIRST) + NEW - 1
    assert stats["kept_disk"]["read_tokens"] == found[tmp_path] - found[None]


def test_it_comes_back_after_a_restart_and_nothing_else_is_left(mixtral, tmp_path):
    with Engine(mixtral, kv_memory=ROOM, kept_folder=tmp_path) as engine:
        turn = leave(engine, mixtral)
        written(engine)
    assert not writers()
    assert engine.stats()["kept_disk"] is None
    (own,) = tmp_path.iterdir()
    assert own.stat().st_mode & 0o77 == 0, "others read what was talked about"
    assert {one.suffix for one in own.iterdir() if one.name != "lock"} == {".run"}
    (own / ".left.run.partial").write_bytes(b"of a process that was killed")
    with Engine(mixtral, kept_folder=str(tmp_path)) as engine:
        assert engine.stats()["kept_disk"]["files"] == len(run_files(tmp_path)) == 2
        assert not list(own.glob(".*"))
        assert answer(engine, mixtral, turn).cached_tokens == len(FIRST) + NEW - 1
        engine._memory.speeds.prefill_s = 0.0  # nothing is faster than computing
        assert answer(engine, mixtral, [*OTHER, 9]).cached_tokens == 0


@pytest.mark.parametrize("damage", ["flipped", "header", "cut", "empty", "format"])
def test_a_damaged_file_is_left_out_with_one_warning_and_computed(mixtral, tmp_path, caplog, damage):
    with Engine(mixtral, kv_memory=ROOM, kept_folder=tmp_path) as engine:
        turn = leave(engine, mixtral)
        written(engine)
    for file in tmp_path.glob("*/*.run"):
        content = file.read_bytes()
        changed = bytearray(content)
        changed[-3] ^= 1
        flipped = content.replace(b"data_offsets", b"data_offsetz")
        other = content.replace(b"version 1", b"version 0")
        damaged = {"flipped": bytes(changed), "header": flipped, "cut": content[:-9], "empty": b"", "format": other}
        file.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING), Engine(mixtral, kept_folder=tmp_path) as engine:
        for _ in range(2):
            completion = answer(engine, mixtral, turn)
        assert engine.stats()["kept_disk"]["read_tokens"] == 0
        assert completion.cached_tokens == len(turn) - 1
    names = [record.getMessage().split(" is not used")[0] for record in caplog.records]
    assert len(names) == len(set(names)) > 0


def test_files_stay_inside_their_bytes_and_the_last_used_stay(mixtral, tmp_path):
    most = 30_000
    with Engine(mixtral, kv_memory=ROOM, kept_folder=tmp_path, kept_disk=most) as engine:
        for seed in range(8):
            answer(engine, mixtral, tokens(30, seed))
            stats = written(engine)
            files = [one.stat().st_size for one in tmp_path.glob("*/*.run")]
            assert stats["bytes"] == sum(files) <= most
        assert stats["removed_files"] > 0
        assert stats["files"] == len(files) > 0
        assert stats["written_tokens"] >= 7 * (30 + NEW - 1) - 60
    with Engine(mixtral, kept_folder=tmp_path, kept_disk=max(files)) as engine:
        assert engine.stats()["kept_disk"]["files"] == 1


def test_branches_leave_and_come_back_though_they_are_other_runs_by_then(mixtral, tmp_path):
    trunk = tokens(24, 13)  # its answers have no token 0, which generate would take for padding
    prompts = [[*trunk, *tokens(40, seed)] for seed in (11, 12)]
    with Engine(mixtral, kv_memory=220 * POSITION_BYTES, kept_folder=tmp_path) as engine:
        turns = [[*prompt, *answer(engine, mixtral, prompt).token_ids, 9] for prompt in prompts]
        written(engine)
        for seed in (8, 9):
            answer(engine, mixtral, tokens(180, seed))
        assert [answer(engine, mixtral, turn).cached_tokens for turn in turns] == [64 + NEW - 1] * 2
        assert engine.stats()["kept_disk"]["read_tokens"] == 64 + NEW - 1 + 40 + NEW - 1


def test_a_folder_is_one_engines_at_a_time(mixtral, tmp_path):
    with Engine(mixtral, kept_folder=tmp_path):
        with pytest.raises(ConfigError, match=r"another engine keeps its prefixes in .* give another kept_folder"):
            Engine(mixtral, kept_folder=tmp_path)
        assert len(writers()) == 1
    engine = Engine(mixtral, kept_folder=tmp_path)
    del engine
    gc.collect()
    assert not writers(), "an engine that was not closed left its thread"
    Engine(mixtral, kept_folder=tmp_path).close()


def test_a_close_in_the_middle_leaves_whole_files_only(mixtral, tmp_path):
    for seed in range(3):
        engine = Engine(mixtral, kv_memory=ROOM, kept_folder=tmp_path)
        engine.generate([tokens(80, seed)], GREEDY)
        engine.close()
        engine.close()
        assert not writers()
    with Engine(mixtral, kept_folder=tmp_path) as engine:
        assert engine.stats()["kept_disk"]["files"] == len(run_files(tmp_path))
        assert not list(tmp_path.glob("*/.*"))


def test_a_full_disk_ends_the_writing_with_one_warning_and_the_engine_goes_on(mixtral, tmp_path, caplog):
    turn = [*FIRST, *generated(mixtral, FIRST), 7, 8]
    expected = generated(mixtral, turn)

    def limited():
        engine = Engine(mixtral, kv_memory=ROOM, kept_folder=tmp_path)
        for prompt in (FIRST, OTHER, turn, OTHER):
            (completion,) = engine.generate([prompt], GREEDY)
            engine._memory.disk.writer.waiting.join()
            assert completion.error is None
            assert prompt is not turn or completion.token_ids == expected
        assert engine._memory.disk.writer.failed
        assert engine.stats()["kept_disk"]["files"] == 0
        assert len([one for one in caplog.records if "No more kept prefixes are written" in one.getMessage()]) == 1
        engine.close()

    assert with_full_disk(2000, limited) == 0
    assert not run_files(tmp_path)
    assert not list(tmp_path.glob("*/.*"))


def test_what_cannot_be_is_refused(mixtral, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeflowError, match="cannot be written"):
        Engine(mixtral, kept_folder=tmp_path / "file")
    with pytest.raises(ConfigError, match="kept_disk"):
        Engine(mixtral, kept_folder=tmp_path, kept_disk="much")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"share_prefixes": False}, "share_prefixes=False"),
        ({"kv_policy": "sinks"}, 'kv_policy="sinks": what a sequence has forgotten'),
        ({"kv_policy": "heavy_hitters"}, 'kv_policy="heavy_hitters": what a sequence has forgotten'),
    ],
)
def test_where_nothing_is_kept_a_disk_is_refused(mixtral, tmp_path, options, named):
    with pytest.raises(ConfigError, match=f"kept_folder .* {named}"):
        Engine(mixtral, kept_folder=tmp_path / "folder", **options)
    assert not writers()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_left_for_experts_comes_back_too(mixtral_folder, mixtral, tmp_path):
    experts, others = 3 * 73728, 260 * (POSITION_BYTES + 128)  # the fewest; and with a copy of a layer's keys
    loaded = load_moe(mixtral_folder, memory=experts + others, predictor=None, step="python")
    with loaded.moeflow as runtime, Engine(loaded, kept_folder=tmp_path) as engine:
        first = answer(engine, mixtral, FIRST)
        assert written(engine)["files"] == 1, "kept for experts, however little there is"
        answer(engine, mixtral, tokens(200, 2))
        assert engine._memory.kept.common((), FIRST) < len(FIRST)
        turn = answer(engine, mixtral, [*FIRST, *first.token_ids, 7, 8])
        assert turn.cached_tokens == len(FIRST) + NEW - 1
        assert 0 < engine.stats()["kept_disk"]["read_tokens"] <= turn.cached_tokens
        memory = runtime.stats()["memory"]
        assert memory["shared_peak_bytes"] <= memory["shared_budget_bytes"] == experts + others


def test_a_disk_that_stands_still_holds_nothing_of_a_run_that_leaves(mixtral, tmp_path):
    with Engine(mixtral, kv_memory=3 * ROOM) as engine:
        answer(engine, mixtral, tokens(120, 1))
        kept, layout = engine._memory.kept, engine._memory._layout
        run = LeavingRun.of(kept.run_of(kept.nodes()[0]))
        pipe, copying, found = tmp_path / "pipe", threading.Lock(), []
        os.mkfifo(pipe)
        copied = CopiedPiece(copying)
        thread = threading.Thread(
            target=lambda: found.append(write_run(pipe, "model", run, layout, copied, lambda: True))
        )
        thread.start()
        with open(pipe, "rb") as disk:
            disk.read(8)  # it has begun, and waits for the rest to be taken
            engine.close()
            with copying:
                assert not any(weak() is not None for weak in run.tensors.values())
            disk.read()
            thread.join()
        assert found == [False]
