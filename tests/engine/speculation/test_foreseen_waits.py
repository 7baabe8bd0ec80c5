"""Foreseen waits: what is taken in are the routes that tokens took; what is missing is what no memory holds."""

import numpy as np
import pytest
import torch

from helpers.engine_requests import assert_empty, generated, tokens
from helpers.told_drafts import likely_or_not, use
from moeflow import Engine, SamplingParams, load_moe
from moeflow.core import ExpertKey
from moeflow.engine.regrouping.step_groups import PassRoutes
from moeflow.engine.sequence import Piece, Sequence
from moeflow.engine.speculation.foreseen_waits import ForeseenWaits
from moeflow.kernels.cpu.library import instruction_set
from moeflow.policy.cache import ExpertCache

needs_kernels = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
LAYERS, EXPERTS, TOP_K = 3, 8, 2
PROMPT = tokens(9, 3)
ASKED = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture
def load(mixtral_folder):
    """Load the tiny Mixtral; every one is closed after the test."""
    made = []

    def load(memory="50%", step="auto"):
        made.append(load_moe(mixtral_folder, expert_memory=memory, predictor=None, step=step, device="cpu"))
        return made[-1]

    yield load
    for model in made:
        model.moeflow.close()


def taken_in(foreseen):
    """Tokens and sets of experts [tokens, L] that it takes in from now on, by sequence."""
    found, observe = {}, foreseen.likely.observe

    def observing(sequence, tokens, routes):
        known = found.setdefault(sequence, ([], []))
        known[0].extend(tokens)
        known[1].extend(np.sort(routes, axis=2).tolist())
        observe(sequence, tokens, routes)

    foreseen.likely.observe = observing
    return found


def true_routes(model, text):
    """Sets of experts [tokens, L] that a pass over a whole text takes."""
    watching = PassRoutes(LAYERS, EXPERTS)
    model.moeflow.observers.append(watching)
    try:
        with torch.no_grad():
            model(torch.tensor([text]), use_cache=False)
    finally:
        model.moeflow.observers.remove(watching)
    return np.sort(watching.take(len(text)), axis=2).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("step", ["python", pytest.param("auto", marks=needs_kernels)])
def test_routes_that_are_taken_in_are_those_that_the_answers_tokens_took(load, step):
    """Those of rejected tokens are not among them."""
    model = load(step=step)
    expected = generated(model, PROMPT, 40)
    with Engine(model, speculation={"gated": False, "packed": step == "python"}) as engine:
        use(engine, likely_or_not({tuple(PROMPT): expected}))
        found = taken_in(engine._runner.routes)
        (completion,) = engine.generate([PROMPT], ASKED)
        stats = engine.stats()["speculation"]
        assert not model.moeflow.observers
        assert_empty(engine)
        assert not len(engine._runner.routes.likely), "a sequence that has ended is kept"
    assert completion.token_ids == expected
    counts = stats["sources"]["told"]
    assert 0 < counts["accepted"] < counts["proposed"]
    ((fed, routes),) = found.values()
    text = PROMPT + expected
    assert fed == text[: len(fed)]
    assert len(text) - 8 <= len(fed) < len(text)
    assert routes == true_routes(model, text)[: len(fed)]


def test_nothing_is_taken_in_where_every_expert_has_room_and_while_drafts_rest(load):
    model = load("100%", "python")
    with Engine(model, speculation={"packed": True}) as engine:
        found = taken_in(engine._runner.routes)
        engine.generate([PROMPT], ASKED)
        assert not found
    model = load("50%", "python")
    with Engine(model, speculation={"packed": True}) as engine:
        found, gate = taken_in(engine._runner.routes), engine._speculation._gate
        gate._resting = 1000
        engine.generate([PROMPT], ASKED)
        assert [fed for fed, _ in found.values()] == [PROMPT]


@pytest.mark.slow
@needs_kernels
def test_answers_at_half_of_the_experts_are_those_without_drafts(load):
    model = load()
    prompts = [PROMPT, tokens(5, 8) * 2]
    expected = [generated(model, prompt, 40) for prompt in prompts]
    with Engine(model, speculation={"most": 7}) as engine:
        use(engine, likely_or_not(dict(zip(map(tuple, prompts), expected, strict=True))))
        foreseen, asked = engine._runner.routes, []
        waits = foreseen.waits
        foreseen.waits = lambda *about: asked.append(about) or waits(*about)
        for _ in range(3):
            assert [one.token_ids for one in engine.generate(prompts, ASKED)] == expected
        stats = engine.stats()["speculation"]
    assert asked, "nothing was foreseen"
    assert stats["waits"]["seconds_a_miss"] + stats["waits"]["seconds_a_token"] > 0


@needs_kernels
def test_the_union_of_experts_is_counted_by_drafted_tokens(load):
    model = load()
    answer = generated(model, PROMPT, 40)
    with Engine(model, speculation={"gated": False, "most": 3}) as engine:
        use(engine, likely_or_not({tuple(PROMPT): answer[:30]}))
        engine.generate([PROMPT], ASKED)
        union = engine.stats()["speculation"]["union"]
    assert 1 < union["1+3"] <= EXPERTS / TOP_K


class Fed:
    """Foreseen waits of a real runtime, with tokens whose routes a test says."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.foreseen = ForeseenWaits(runtime, TOP_K)
        self.foreseen.begin_step(routes=True)

    def took(self, token, *experts):
        """Let a token take two experts in every layer."""
        route = np.tile(np.array(experts), (1, LAYERS, 1))
        sequence = Sequence(f"of {token}", [token], 1)
        self.foreseen.saw([Piece(sequence, [token], True)], route)
        self.foreseen.forget(sequence.id)

    def fetch(self, *experts):
        """Demand experts in every layer."""
        for layer in range(LAYERS):
            for _ in self.runtime.fetch(layer, list(experts)):
                pass

    def step(self, *experts):
        """Foresee a step of token 1, and let it demand experts."""
        self.foreseen.begin_step(routes=True)
        found = self.foreseen.waits([("a", 1)], 1)
        self.fetch(*experts)
        self.foreseen.finish_step(0, 1.0)
        return found


def evict_all(runtime):
    with runtime.changing() as residency:
        residency.clear()


def test_a_token_waits_for_what_is_not_in_memory_and_no_token_before_it_needs(load):
    runtime = load("50%", "python").moeflow
    fed = Fed(runtime)
    for token, pair in enumerate([(0, 1), (0, 2), (2, 3), (6, 7)], 1):
        fed.took(token, *pair)
    for _ in range(4):
        evict_all(runtime)
        assert fed.step(0, 1) is None  # what a miss costs is measured first
    cost_s, of_a_token_s = fed.foreseen.costs
    assert cost_s > 0
    assert of_a_token_s == 0  # all was foreseen
    evict_all(runtime)
    fed.fetch(6, 7)
    tokens = [("a", 1), ("a", 2), ("a", 3), ("a", 4)]
    assert ExpertKey(0, 6) in runtime.cache
    assert fed.foreseen.waits(tokens, 1) == pytest.approx([cost_s * LAYERS * count for count in (2, 1, 1, 0)])
    assert fed.foreseen.waits(tokens, 2) == pytest.approx([cost_s * LAYERS * count for count in (3, 1, 0)])
    assert fed.foreseen.waits(tokens[::-1], 1) == pytest.approx([cost_s * LAYERS * count for count in (0, 2, 1, 1)])


def test_a_reset_of_the_counters_costs_no_more_than_a_step(load):
    runtime = load("50%", "python").moeflow
    fed = Fed(runtime)
    fed.took(1, 0, 1)
    fed.fetch(0, 1)
    fed.foreseen.begin_step(routes=True)
    runtime.reset_stats()
    assert fed.foreseen.finish_step(0, 1.0) == (1.0, 0.0, 0)
    fed.foreseen.begin_step(routes=True)
    fed.fetch(4)
    assert fed.foreseen.finish_step(0, 1.0).num_experts == LAYERS


def test_waits_while_memory_fills_are_left_out_and_those_behind_are_not(load):
    runtime = load("50%", "python").moeflow
    fed = Fed(runtime)
    measured = []
    for experts in [(0, 1), (2, 3), (4, 5), (6, 7)]:  # half of them fit
        before_s = runtime.expert_fetch.demanded()[1]
        fed.foreseen.begin_step(routes=True)
        fed.fetch(*experts)
        waited_s = runtime.expert_fetch.demanded()[1] - before_s
        assert waited_s > 0
        measured.append((fed.foreseen.finish_step(0, 1.0), waited_s))
    assert runtime.cache.evictions > 0
    for step, waited_s in measured[:2]:
        assert step == pytest.approx((1.0 - waited_s, 0.0, 2 * LAYERS))
    for step, waited_s in measured[2:]:
        assert step == pytest.approx((1.0, waited_s, 2 * LAYERS))


class Counted:
    """Experts of which nothing is in memory, with waits that a test says."""

    def __init__(self):
        self.experts_per_layer, self.cache, self.observers = [EXPERTS], ExpertCache(EXPERTS - 1), []
        self.expert_fetch, self.waited_s = self, 0.0

    def demanded(self):
        return 0, self.waited_s

    def step(self, foreseen, tokens, seconds):
        """Foresee a step of tokens, let it wait, and return what was foreseen."""
        foreseen.begin_step(routes=True)
        found = foreseen.waits([("a", token) for token in tokens], 1)
        self.waited_s += seconds
        foreseen.finish_step(len(tokens) - 1, seconds)
        return found


def test_waits_are_parted_into_those_of_experts_and_those_of_tokens_that_nobody_knows():
    experts = Counted()
    foreseen = ForeseenWaits(experts, TOP_K)
    foreseen.begin_step(routes=True)
    foreseen.saw([Piece(Sequence("b", [7], 1), [7], True)], np.array([[[0, 1]]]))
    foreseen.saw([Piece(Sequence("b", [8], 1), [8], True)], np.array([[[2, 3]]]))
    foreseen.forget("b")
    for _ in range(3):
        experts.step(foreseen, [7, 8, 99], 4 * 0.25 + 3 * 0.5)
        experts.step(foreseen, [99, 7], 2 * 0.25 + 2 * 0.5)
    assert foreseen.costs == pytest.approx((0.25, 0.5))
    assert experts.step(foreseen, [7, 99, 8], 0.0) == pytest.approx([1.0, 0.5, 1.0])


def test_where_nothing_was_foreseen_all_tokens_wait_alike():
    experts = Counted()
    foreseen = ForeseenWaits(experts, TOP_K)
    for _ in range(4):
        assert foreseen.costs is None
        experts.step(foreseen, [99, 98], 3.0)
    assert foreseen.costs == pytest.approx((0.0, 1.5))


def test_experts_that_are_foreseen_in_vain_cost_nothing():
    experts = Counted()
    foreseen = ForeseenWaits(experts, TOP_K)
    foreseen.begin_step(routes=True)
    foreseen.saw([Piece(Sequence("b", [7], 1), [7], True)], np.array([[[0, 1]]]))
    foreseen.forget("b")
    for _ in range(4):
        experts.step(foreseen, [7], 1.0)
        experts.step(foreseen, [99], 2.0)
    assert foreseen.costs.seconds_a_miss == 0
    assert 1 < foreseen.costs.seconds_a_token < 2
