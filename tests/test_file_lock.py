"""Locks: one holder at a time, taken over from the dead, and no file stays."""

import os
import signal

import pytest

from helpers.forks import in_child
from moeflow.file_lock import exclusive, lock_file

pytest.importorskip("fcntl")


class TakenError(Exception):
    pass


def refuse():
    raise TakenError


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path):
    with exclusive(tmp_path / "lock"):
        with pytest.raises(TakenError), exclusive(tmp_path / "lock", on_taken=refuse):
            pass

        def other():
            with exclusive(tmp_path / "lock", on_taken=refuse):
                pass

        assert in_child(other) == 1
    assert not list(tmp_path.iterdir())
    with exclusive(tmp_path / "lock"):
        pass


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path):
    def die():
        with exclusive(tmp_path / "lock"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with exclusive(tmp_path / "lock", on_taken=refuse):
        pass
    assert not list(tmp_path.iterdir())


def test_a_child_of_a_fork_does_not_keep_the_lock(tmp_path):
    read, write = os.pipe()
    with exclusive(tmp_path / "lock"):
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)  # lives until the parent is through
            os._exit(0)
    (tmp_path / "lock").touch()
    with exclusive(tmp_path / "lock", on_taken=refuse):
        pass
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)


def test_a_file_that_was_replaced_is_not_the_one_to_lock(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        assert lock_file(file.fileno(), tmp_path / "a")
        os.unlink(tmp_path / "a")
        assert not lock_file(file.fileno(), tmp_path / "a")
        (tmp_path / "a").touch()
        assert not lock_file(file.fileno(), tmp_path / "a")
