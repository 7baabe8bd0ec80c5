"""Hundreds of requests with cancels at random leave nothing behind."""

import random
import threading
import weakref

import pytest
import torch

from helpers.engine_requests import POSITION_BYTES, answers, assert_empty, tokens
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("groups", [{}, {"group_size": 4}], ids=["one pass", "groups"])
def test_five_hundred_requests_with_cancels_at_random_leave_nothing_behind(mixtral, mixtral_folder, groups):
    torch.set_num_threads(1)
    rng = random.Random(0)
    pool = [tokens(rng.randrange(1, 30), seed) for seed in range(6)]
    pool += [pool[place] + pool[(place + 1) % 6] for place in range(6)]
    whole = answers(Engine(mixtral), pool, SamplingParams(max_new_tokens=5, ignore_eos=True))
    threads = set(threading.enumerate())
    model = load_moe(mixtral_folder, expert_memory="50%", predictor=None) if groups else mixtral
    engine = Engine(model, max_batch_size=16, max_step_tokens=64, kv_memory=300 * POSITION_BYTES, **groups)
    wanted, cancelled, slots = {}, set(), weakref.WeakSet()
    while len(wanted) < 500 or not engine.finished:
        for _ in range(min(rng.randrange(12), 500 - len(wanted))):
            place, num_new = rng.randrange(6) + 6 * (rng.random() < 0.3), rng.randrange(1, 6)
            id = engine.add(pool[place], SamplingParams(max_new_tokens=num_new, ignore_eos=True), id=str(len(wanted)))
            wanted[id] = whole[place][:num_new]
        if rng.random() < 0.5 and wanted:
            id = str(rng.randrange(len(wanted)))
            cancelled |= {id} if engine.cancel(id) else set()
        reported = engine.step()
        slots.update(engine._memory[sequence.id] for sequence in engine._scheduler.running)
        for completion in (output.completion for output in reported):
            if completion is not None:
                expected = wanted[completion.id]
                assert (completion.finish_reason == "cancelled") == (completion.id in cancelled)
                assert completion.token_ids == expected[: len(completion.token_ids)]
                assert completion.id in cancelled or completion.token_ids == expected
        engine.check_integrity()
        if groups:
            assert len(engine._groups._scheduler._likely) <= engine.stats()["running"]
            model.moeflow.check_integrity()
    reasons = engine.stats()["finished"]
    assert reasons == {"stop": 0, "length": 500 - len(cancelled), "cancelled": len(cancelled), "error": 0}
    assert len(cancelled) > 10
    assert_empty(engine)
    assert not slots, "keys and values of ended requests are still held"
    if groups:
        assert engine.stats()["regrouping"]["planned"] > 10
        assert len(engine._groups._scheduler._likely) == 0
        model.moeflow.close()
    engine.close()
    assert set(threading.enumerate()) == threads
