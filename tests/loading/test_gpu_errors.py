"""What a GPU raises in a pass: one line, and then a model that runs, or one that refuses all and can be closed."""

import inspect
import logging
from contextlib import closing

import pytest
import torch

from helpers.expert_runtimes import ThreadStreams, build, fetch, write_experts
from moeflow import Engine, load_moe
from moeflow.errors import ExpertReadError, GpuError
from moeflow.loading.gpu_errors import run_on_gpu, tell_in_generate

LOST = "CUDA error: an illegal memory access was encountered"
MORE = "\nCUDA kernel errors might be asynchronously reported at some other API call\nand more lines"
TOKENS = torch.tensor([[5, 6, 7, 8]])


class Driver:
    """What the driver says: of a card that is there, or is lost."""

    def __init__(self, monkeypatch):
        self.lost, self.emptied = False, 0
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)

    def synchronize(self, device):
        if self.lost:
            raise RuntimeError(LOST + MORE)

    def empty(self):
        self.emptied += 1


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


@pytest.fixture
def model(mixtral_folder):
    model = load_moe(mixtral_folder, device="cpu", expert_memory="50%", predictor=None, step="python")
    with model.moeflow:
        yield model


class Failing:
    """A layer that raises once the experts of the layers before it have run; a runtime that believes in a GPU."""

    def __init__(self, model, error):
        self._model, self._error = model, error

    def __enter__(self):
        layer = self._model.model.layers[0]  # before its experts, which would see tensors of the CPU

        def fail(*_):
            raise self._error

        self._hook = layer.register_forward_pre_hook(fail)
        self._model.moeflow.device = torch.device("cuda", 0)

    def __exit__(self, *_):
        self._hook.remove()
        self._model.moeflow.device = torch.device("cpu")


def test_a_pass_without_memory_is_one_line_and_the_model_answers_afterwards(driver, model):
    before = model(TOKENS).logits
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nmore lines")
    with Failing(model, error), pytest.raises(GpuError) as told:
        model.generate(TOKENS, max_new_tokens=4)
    assert "\n" not in str(told.value)
    assert "cuda:0 has too little free memory for this pass (CUDA out of memory. Tried to allocate" in str(told.value)
    assert told.value.__context__ is None, "which would hold the tensors of the pass"
    assert driver.emptied == 1
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore lines"), "GpuError: cuda:0 has too little"),
        (RuntimeError("shapes differ\nmore lines"), "RuntimeError: shapes differ"),
    ],
)
def test_a_request_whose_pass_fails_ends_in_one_line(driver, model, error, told):
    with Engine(model) as engine:
        with Failing(model, error):
            (failed,) = engine.generate([[5, 6, 7]])
        (answered,) = engine.generate([[5, 6, 7]])
    assert (failed.finish_reason, answered.error) == ("error", None)
    assert failed.error.startswith(told)
    assert "\n" not in failed.error


@pytest.mark.parametrize("raised", [LOST, "Triton Error [CUDA]: an illegal memory access was encountered"])
def test_an_error_of_the_driver_that_goes_away_leaves_the_model(driver, model, raised):
    before = model(TOKENS).logits
    with Failing(model, RuntimeError(raised + MORE)), pytest.raises(GpuError, match="stays usable: call again") as told:
        model(TOKENS)
    assert raised in str(told.value)
    assert "\n" not in str(told.value)
    assert torch.equal(model(TOKENS).logits, before)


def test_a_lost_card_is_said_by_every_later_call_and_closing_ends(driver, model):
    driver.lost = True
    with Failing(model, RuntimeError(LOST + MORE)), pytest.raises(GpuError, match="of no use to this process"):
        model(TOKENS)
    for call in (
        lambda: model(TOKENS),
        lambda: Engine(model),
        lambda: model.generate(TOKENS, max_new_tokens=3),
        lambda: next(model.moeflow.fetch(0, [1])),
    ):
        with pytest.raises(GpuError, match=f"^cuda:0 is of no use .*{LOST}") as told:
            call()
        assert "\n" not in str(told.value)
    assert model.moeflow.closed
    assert model.moeflow.stats()["slots"] > 0


def test_generate_tells_what_fails_outside_of_the_layers(driver, model):
    before, signature = model.generate(TOKENS, max_new_tokens=3), inspect.signature(model.generate)
    tell_in_generate(model, model.moeflow)
    assert inspect.signature(model.generate) == signature
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3), before)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(GpuError, match="has too little free memory"):
        model.generate(TOKENS, max_new_tokens=3)
    hook.remove()
    assert torch.equal(model.generate(TOKENS, max_new_tokens=3), before)


def test_what_is_no_error_of_the_driver_is_as_it_is(driver, model):
    for error in (RuntimeError("shapes differ"), ExpertReadError("expert 3"), ValueError("CUDA error: no")):
        with Failing(model, error), pytest.raises(type(error)) as told:
            model(TOKENS)
        assert told.value is error


class LostStreams(ThreadStreams):
    """A card that is lost once `lost`: whatever asks the driver raises."""

    lost = False

    def copy(self, target, source, after, **options):
        self._ask()
        return super().copy(target, source, after, **options)

    def wait(self, event):
        self._ask()
        super().wait(event)

    def done(self, event):
        self._ask()
        return super().done(event)

    def finish(self):
        self._ask()
        super().finish()

    def _ask(self):
        if self.lost:
            raise RuntimeError(LOST + MORE)


@pytest.mark.parametrize("waits", [False, True])
def test_a_runtime_on_a_lost_card_refuses_and_closes_with_a_warning(tmp_path, driver, caplog, waits):
    """The error comes up in a later call than the one that caused it, asking for an expert or with some in flight."""
    path, values = write_experts(tmp_path / "experts.bin")
    streams = LostStreams()
    runtime = build(path, 4, host_slots=9, streams=streams)
    fetch(runtime, 0, [0, 1], values)
    if waits:
        fetched = runtime.fetch(1, [0, 1, 2, 3, 4])
        next(fetched)
    streams.lost = driver.lost = True

    def use():
        with closing(runtime.fetch(0, [0, 1, 2])) as fetched:
            list(fetched)

    if waits:
        # A reading thread may have started the copy that failed: then it is that expert's error.
        with pytest.raises((GpuError, ExpertReadError), match=f"of no use|{LOST}"):
            run_on_gpu(runtime, lambda: list(fetched))
    for _ in range(3):
        with pytest.raises((GpuError, ExpertReadError), match=LOST) as told:
            run_on_gpu(runtime, use)
        assert "\n" not in str(told.value)
    with pytest.raises(GpuError, match="of no use"):
        use()
    with caplog.at_level(logging.WARNING):
        runtime.close()
        runtime.close()
    assert [record.message for record in caplog.records if "GPU failed" in record.message] == [
        f"the GPU failed before the model was released ({LOST})"
    ]
    assert len(runtime._parts.pools[0].tensor) == 0
