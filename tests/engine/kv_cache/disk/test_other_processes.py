"""Other processes and a disk: one that is killed in a file, one that wants the same folder, and children of a fork."""

import logging
import resource
import signal

import pytest

from helpers.engine_requests import GREEDY, NEW, POSITION_BYTES, assert_empty, generated, tokens
from helpers.forks import in_child
from moeflow import Engine
from moeflow.errors import ConfigError

FIRST = tokens(50, 1)
FILE_BYTES = 57 * POSITION_BYTES  # and a header
ROOM = 100 * POSITION_BYTES


def first_turn(model, folder):
    """Answer the first prompt and let it be written; return the engine."""
    engine = Engine(model, kv_memory=ROOM, kept_folder=folder)
    assert engine.generate([FIRST], GREEDY)[0].token_ids == generated(model, FIRST)
    engine._memory.disk.writer.waiting.join()
    return engine


@pytest.mark.parametrize("most", [100, FILE_BYTES // 2, FILE_BYTES])
def test_a_process_that_is_killed_in_the_middle_of_a_file_leaves_none(mixtral, tmp_path, most, caplog):
    def killed():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills it where a file would be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        first_turn(mixtral, tmp_path)

    assert in_child(killed) == -signal.SIGXFSZ
    (own,) = tmp_path.iterdir()
    assert not list(own.glob("*.run"))
    assert list(own.glob(".*.partial")), "it was in the middle of one"
    with caplog.at_level(logging.WARNING), Engine(mixtral, kept_folder=tmp_path) as engine:
        assert [one.name for one in own.iterdir()] == ["lock"]
        assert engine.stats()["kept_disk"]["files"] == 0
    assert not caplog.records
    with first_turn(mixtral, tmp_path) as engine:
        assert engine.stats()["kept_disk"]["files"] == 1
    turn = [*FIRST, *generated(mixtral, FIRST), 7]
    with Engine(mixtral, kept_folder=tmp_path) as engine:
        assert engine.generate([turn], GREEDY)[0].cached_tokens == len(FIRST) + NEW - 1


def test_another_process_is_refused_the_folder_until_this_one_gives_it_back(mixtral, tmp_path):
    def refused():
        with pytest.raises(ConfigError, match="another engine keeps its prefixes in"):
            Engine(mixtral, kept_folder=tmp_path)

    engine = first_turn(mixtral, tmp_path)
    assert in_child(refused) == 0
    engine.close()
    assert in_child(lambda: first_turn(mixtral, tmp_path)) == 0, "it ends without closing, and so lets it go"
    Engine(mixtral, kept_folder=tmp_path).close()


def test_a_child_of_a_fork_goes_on_without_the_disk_and_leaves_it_to_the_parent(mixtral, tmp_path):
    engine = first_turn(mixtral, tmp_path)
    turn = [*FIRST, *generated(mixtral, FIRST), 7]
    expected, files = generated(mixtral, turn), sorted(tmp_path.glob("*/*"))

    def child():
        assert engine.stats()["kept_disk"] is None
        assert all(node.written is None for node in engine._memory.kept.nodes()), "nothing waits for a thread"
        for prompt in (tokens(60, 2), turn):
            (completion,) = engine.generate([prompt], GREEDY)
            assert completion.error is None
        assert completion.token_ids == expected
        assert_empty(engine)
        engine.close()

    with engine._memory._room.copying:  # the thread is in the middle of a run
        assert in_child(child) == 0
    assert sorted(tmp_path.glob("*/*")) == files
    with pytest.raises(ConfigError, match="another engine keeps"):
        Engine(mixtral, kept_folder=tmp_path)
    with engine:
        engine.generate([tokens(60, 2)], GREEDY)
        assert engine.generate([turn], GREEDY)[0].token_ids == expected
        engine._memory.disk.writer.waiting.join()
        assert engine.stats()["kept_disk"]["files"] > 1
        assert engine.stats()["kept_disk"]["read_tokens"] > 0
