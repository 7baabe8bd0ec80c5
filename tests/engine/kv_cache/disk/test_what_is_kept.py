"""Whatever an engine keeps comes back from the disk as it was: windows, records of few bits, and beside a policy."""

from functools import partial

import pytest

from helpers.engine_requests import GREEDY, NEW, assert_empty, tokens
from helpers.small_models import tiny_mixtral
from helpers.window_models import chunked_model, windowed_model
from moeflow import Engine

FIRST = tokens(50, 1)


def exact(head_dim):
    """A model in float64, where the shape of a product hardly ever moves a number over a code's border."""
    model = tiny_mixtral(head_dim=head_dim).double()
    model.config._experts_implementation = "eager"  # others take no float64
    return model


KINDS = {
    "windowed": (windowed_model, {}),
    "chunked": (chunked_model, {}),
    "int8": (partial(exact, 48), {"kv_format": "int8"}),
    "int4": (partial(exact, 16), {"kv_format": "int4"}),
    "windowed int4": (partial(windowed_model, head_dim=16), {"kv_format": "int4"}),
    "pages": (tiny_mixtral, {"kv_policy": {"name": "pages", "page": 4, "pages": 6}}),
}


def ask(engine, prompt):
    (completion,) = engine.generate([prompt], GREEDY)
    assert completion.error is None
    engine._memory.disk.writer.waiting.join()
    assert_empty(engine)
    return completion


def leave(engine, prompt):
    """Let other conversations come until nothing of a prompt is in memory."""
    for seed in range(2, 12):
        ask(engine, tokens(60, seed))
        if not engine._memory.kept.common((), prompt):
            return
    raise AssertionError("a conversation stays in memory whatever comes")


@pytest.mark.parametrize("kind", KINDS)
def test_it_leaves_comes_back_and_outlasts_a_restart(tmp_path, kind):
    make, options = KINDS[kind]
    model = make()
    with Engine(model, share_prefixes=False, **options) as fresh:
        first = fresh.generate([FIRST], GREEDY)[0].token_ids
        turn = [*FIRST, *first, 7, 8]
        second = fresh.generate([turn], GREEDY)[0].token_ids
        room = 160 * fresh.stats()["kv_position_bytes"]
    with Engine(model, kv_memory=room, kept_folder=tmp_path, **options) as engine:
        assert ask(engine, FIRST).token_ids == first
        leave(engine, FIRST)
        completion = ask(engine, turn)
        assert completion.token_ids == second
        assert completion.cached_tokens == len(FIRST) + NEW - 1
        stats = engine.stats()
        assert stats["kept_disk"]["read_tokens"] == len(FIRST) + NEW - 1
        assert stats["kv_peak_bytes"] <= room
    with Engine(model, kept_folder=tmp_path, **options) as engine:
        assert engine.stats()["kept_disk"]["files"] > 1
        completion = ask(engine, turn)
        assert completion.token_ids == second
        assert completion.cached_tokens >= len(FIRST) + NEW - 1


def test_each_format_and_policy_has_files_of_its_own(tmp_path):
    model = tiny_mixtral(head_dim=16)
    for count, options in enumerate(({}, {"kv_format": "int8"}, {"kv_format": "int4"}, KINDS["pages"][1]), start=1):
        with Engine(model, kept_folder=tmp_path, **options) as engine:
            assert engine.stats()["kept_disk"]["files"] == 0
            engine._memory.disk._most_kept_bytes = 0  # so that all is written
            ask(engine, FIRST)
            assert engine.stats()["kept_disk"]["files"] == 1
        assert len(list(tmp_path.iterdir())) == count


@pytest.mark.slow
def test_a_slot_that_has_no_room_beside_its_windows_in_files_reads_nothing_and_computes(tmp_path):
    model = windowed_model()
    with Engine(model, share_prefixes=False) as fresh:
        turn = [*FIRST, *fresh.generate([FIRST], GREEDY)[0].token_ids, 7, 8]
        expected = fresh.generate([turn], GREEDY)[0].token_ids
    for room in range(34_304, 70_000, 4096):  # that of its slot, and more
        with Engine(model, kv_memory=room, kept_folder=tmp_path / str(room)) as engine:
            ask(engine, FIRST)
            leave(engine, FIRST)
            completion = ask(engine, turn)
            assert completion.token_ids == expected
            assert completion.cached_tokens >= engine.stats()["kept_disk"]["read_tokens"], "what is read is used"
