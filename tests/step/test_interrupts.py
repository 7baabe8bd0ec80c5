"""Ctrl-C in any line of a native step, of a miss in it, of a capture and of its check: the same bits afterwards."""

import copy
import dis
import functools
import signal
import sys
from pathlib import Path

import pytest
import torch

import moeflow
from helpers.native_steps import PROMPT, cache_after, generate
from moeflow import load_moe
from moeflow.kernels.cpu.library import instruction_set

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built"),
]
PACKAGE = str(Path(moeflow.__file__).parent)
TOKENS = (4, 9, 2, 77)


@functools.cache
def first_offset(code, line):
    return next(offset for offset, number in dis.findlinestarts(code) if number == line)


class AtLine:
    """A trace function that interrupts at one line of moeflow's; with line 0 it only counts."""

    def __init__(self, line):
        self.line, self.count, self.place = line, 0, ""

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # A line that is come back to may be the end of a `with` block, where Python never looks for signals.
        if event == "line" and frame.f_lasti == first_offset(frame.f_code, frame.f_lineno):
            self.count += 1
            if self.count == self.line:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self


class AtCall:
    """A profile function that interrupts at one call of any Python function; with call 0 it only counts."""

    def __init__(self, call):
        self.call, self.count, self.place = call, 0, ""

    def __call__(self, frame, event, argument):
        if event == "call":
            self.count += 1
            if self.count == self.call:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)


def interrupt(run, at, install=sys.settrace):
    """Run with an interrupt; return whether one struck."""
    install(at)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        install(None)
    return False


def step(model, cache, token):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits


@pytest.fixture
def load(mixtral_folder):
    loaded = []

    def load(expert_memory="40%", **options):
        model = load_moe(mixtral_folder, device="cpu", expert_memory=expert_memory, step="auto", **options)
        loaded.append(model)
        return model

    yield load
    for model in loaded:
        model.moeflow.close()


@pytest.mark.parametrize("memory", ["100%", "40%"])
def test_a_step_that_was_interrupted_in_any_line_is_run_again(load, memory):
    model = load(memory, predictor=None)
    begun = cache_after(model, 3)
    length = begun.length
    expected = [step(model, copy.deepcopy(begun), token) for token in TOKENS]
    all_lines = AtLine(0)
    interrupt(lambda: step(model, copy.deepcopy(begun), TOKENS[0]), all_lines)
    struck = 0
    for line in range(1, all_lines.count + 40):
        cache, token, at = copy.deepcopy(begun), line % len(TOKENS), AtLine(line)
        struck += interrupt(functools.partial(step, model, cache, TOKENS[token]), at)
        lengths = {layer.length for layer in cache.layers}
        assert lengths in ({length}, {length + 1}), at.place
        cache.crop(length - cache.length)
        assert torch.equal(step(model, cache, TOKENS[token]), expected[token]), at.place
    assert struck > 100
    model.moeflow.check_integrity()
    assert model.moeflow.step.num_steps >= struck + len(TOKENS)


def test_a_signal_from_outside_at_any_moment(load):
    """Most come while the library computes, and are raised behind its call."""
    model = load(predictor=None)
    expected = generate(model, max_new_tokens=40)
    own = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for moment in range(1, 30):
            signal.setitimer(signal.ITIMER_REAL, moment * 0.0007)
            try:
                generate(model, max_new_tokens=40)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, own)
    assert all(map(torch.equal, generate(model, max_new_tokens=40), expected))
    model.moeflow.check_integrity()


def test_a_capture_and_its_check_that_were_interrupted_are_done_again(load, monkeypatch, tmp_path):
    reference = load("100%", predictor=None)
    expected = generate(reference)
    calls = AtCall(0)
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "counted"))  # where no program lies yet
    interrupt(lambda: generate(load("100%", predictor=None), max_new_tokens=3), calls, sys.setprofile)
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "interrupted"))
    model = load("100%", predictor=None)
    for share in (0.05, 0.2, 0.4, 0.6, 0.75, 0.85, 0.9, 0.95):
        at = AtCall(int(calls.count * share))
        interrupt(lambda: generate(model, max_new_tokens=3), at, sys.setprofile)
        assert not any("Fake" in type(weight).__name__ for weight in model.parameters()), at.place
    tokens, logits = generate(model)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(logits, expected[1])
    assert model.moeflow.stats()["step"]["mode"] == "native"
    assert model.moeflow.stats()["step"]["reason"] is None
    assert torch.equal(model(PROMPT).logits, reference(PROMPT).logits)
    model.moeflow.check_integrity()
