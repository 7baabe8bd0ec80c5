"""Native steps from several threads, in the child of a fork, with any number of threads of their own, after close()."""

import copy
import gc
import os
import threading
import weakref

import pytest
import torch

from helpers.forks import in_child
from helpers.native_steps import PROMPT, cache_after, generate, go_on
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ClosedModelError
from moeflow.hf.passes.capture_gate import capture_gate
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPTS = [PROMPT, PROMPT.flip(1), PROMPT[:, 2:], PROMPT + 9]
NEW = 24


@pytest.fixture
def load(mixtral_folder, monkeypatch, tmp_path):
    """Load models with native steps, of which no program lies on disk yet; each is closed after the test."""
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path))
    loaded = []

    def load(memory="40%", **options):
        options = {"predictor": None, "step": "auto", **options}
        loaded.append(load_moe(mixtral_folder, device="cpu", expert_memory=memory, **options))
        return loaded[-1]

    yield load
    torch.set_num_threads(1)
    for model in loaded:
        model.moeflow.close()


@pytest.fixture(scope="module")
def wanted(mixtral_folder):
    """What each prompt is answered alone, [prompts] tokens and logits."""
    torch.set_num_threads(1)
    model = load_moe(mixtral_folder, device="cpu", expert_memory="100%", predictor=None, step="auto")
    with model.moeflow:
        return [generate(model, prompt, max_new_tokens=NEW) for prompt in PROMPTS]


def same(found, expected):
    return all(map(torch.equal, found, expected))


def at_once(*calls):
    """Run calls in threads of their own; return their results."""
    results, begin = [None] * len(calls), threading.Barrier(len(calls))

    def run(number):
        begin.wait()
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_on_one_model_each_get_what_they_get_alone(load, wanted):
    """Also while one captures the step and the others' prompts run: a capture works on a twin of the model."""
    model = load()
    for _ in range(2):
        calls = [lambda prompt=prompt: generate(model, prompt, max_new_tokens=NEW) for prompt in PROMPTS]
        assert all(map(same, at_once(*calls), wanted))
    assert model.moeflow.stats()["step"] == {"mode": "native", "reason": None, "steps": 2 * len(PROMPTS) * (NEW - 1)}
    model.moeflow.check_integrity()


def test_a_pass_whose_end_an_interrupt_swallowed_keeps_no_capture_waiting(load, wanted):
    capture_gate._passing.add(threading.get_ident())  # as an interrupt in the last line of `run` leaves it
    model = load()
    (found,) = at_once(lambda: generate(model, max_new_tokens=NEW))
    assert same(found, wanted[0])


def test_a_model_without_a_name_releases_its_memory_at_once(load, mixtral_folder):
    model = load_moe(mixtral_folder, device="cpu", expert_memory="100%", predictor=None)
    generate(model, max_new_tokens=NEW)
    assert model.moeflow.step.num_steps
    runtime = weakref.ref(model.moeflow)
    gc.collect()
    gc.disable()
    try:
        del model
        assert runtime() is None
    finally:
        gc.enable()


def test_two_models_in_two_threads(load, wanted):
    one, other = load(), load("100%")
    found = at_once(*(lambda model=model: generate(model, max_new_tokens=NEW) for model in (one, other)))
    assert all(same(mine, wanted[0]) for mine in found)
    assert one.moeflow.step.num_steps == other.moeflow.step.num_steps == NEW - 1


@pytest.mark.slow
def test_an_engine_beside_generate(load, wanted):
    model = load()
    with Engine(model) as engine:
        params = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        prompts = [prompt[0].tolist() for prompt in PROMPTS]
        for _ in range(2):
            completions, mine = at_once(
                lambda: engine.generate(prompts, params), lambda: generate(model, max_new_tokens=NEW)
            )
            assert same(mine, wanted[0])
            for completion, prompt, (tokens, _) in zip(completions, PROMPTS, wanted, strict=True):
                assert completion.token_ids == tokens[0, prompt.shape[1] :].tolist()
    assert model.moeflow.stats()["step"]["reason"] is None
    assert same(generate(model, max_new_tokens=NEW), wanted[0])


def test_any_number_of_threads_gives_the_same_bits(load, wanted):
    model = load()
    for num_threads in (2, 1, 3, 5, 1):
        torch.set_num_threads(num_threads)
        assert same(generate(model, max_new_tokens=NEW), wanted[0]), num_threads
    begun = cache_after(model, 3)
    expected, made = [], []
    for logits, threads in ((expected, [1]), (made, [3, 1, 2, 5])):
        cache = copy.deepcopy(begun)
        for turn in range(6):
            torch.set_num_threads(threads[turn % len(threads)])
            with torch.no_grad():
                logits += go_on(model, cache, 3 + turn, 1)
    assert same(made, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_fork_after_loading_and_after_a_step(load, wanted, steps_before):
    torch.set_num_threads(2)  # of OpenMP, which the child lacks
    model = load()
    if steps_before:
        assert same(generate(model, max_new_tokens=NEW), wanted[0])
    begun = cache_after(model, 1 + steps_before)

    def child():
        assert same(generate(model, max_new_tokens=NEW), wanted[0])
        go_on(model, copy.deepcopy(begun))
        assert model.moeflow.step.num_steps
        assert in_child(lambda: same(generate(model, max_new_tokens=NEW), wanted[0]) or os._exit(2)) == 0
        model.moeflow.check_integrity()
        model.moeflow.close()

    assert in_child(child) == 0
    assert same(generate(model, max_new_tokens=NEW), wanted[0])
    model.moeflow.check_integrity()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_captures_and_decodes(load, wanted):
    model, stop, wrong = load(), threading.Event(), []

    def run():
        while not stop.is_set():
            if not same(generate(model, max_new_tokens=NEW), wanted[0]):
                wrong.append("in the thread")

    def child():
        assert same(generate(model, PROMPTS[1], max_new_tokens=NEW), wanted[1])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert [in_child(child) for _ in range(5)] == [0] * 5
    finally:
        stop.set()
        thread.join()
    assert not wrong
    assert same(generate(model, max_new_tokens=NEW), wanted[0])


def test_a_model_that_was_closed_between_two_steps_says_so(load):
    model = load()
    with model.moeflow:
        cache = cache_after(model, 3)
    length = cache.length
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ClosedModelError, match="load it again"):
            go_on(model, cache)
    assert cache.length == length
    model.moeflow.stats()


def test_a_model_that_is_gone_leaves_its_cache(load, mixtral_folder):
    model = load_moe(mixtral_folder, device="cpu", expert_memory="100%", predictor=None, step="auto")
    cache = cache_after(model, 3)
    runtime = weakref.ref(model.moeflow)
    kept = [layer.keys.clone() for layer in cache.layers]
    del model
    gc.collect()
    assert runtime() is None
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, kept, strict=True))
    other = load("100%")
    with torch.no_grad():
        assert len(go_on(other, cache)) == 3


def test_a_copy_of_the_model_is_refused_and_leaves_it_as_it_was(load, wanted):
    model = load()
    generate(model, max_new_tokens=3)
    with pytest.raises(Exception, match="copied"):
        copy.deepcopy(model)
    assert same(generate(model, max_new_tokens=NEW), wanted[0])
