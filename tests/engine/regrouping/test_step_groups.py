"""Groups in an engine's step: the same tokens in any group, and nothing left behind."""

import threading

import pytest
import torch

from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.regrouping.step_groups import PassRoutes
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, ExpertReadError
from moeflow.loading.budget import ExpertsSize

NEW = 10
PROMPTS = [
    torch.randint(3, 120, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 1, 14, 6, 7)
]
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(mixtral):
    out = []
    for prompt in PROMPTS:
        ids = mixtral.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        out.append(ids[0, len(prompt) :].tolist())
    return out


@pytest.fixture
def offloaded(mixtral_folder):
    with torch.no_grad():
        probe = load_moe(mixtral_folder, predictor=None)
    layouts = [source.layout for source in probe.moeflow.store.layers]
    probe.moeflow.close()
    model = load_moe(mixtral_folder, expert_memory=2 * ExpertsSize.of(layouts, 2).min_bytes, predictor=None)
    yield model
    model.moeflow.close()


def answers(engine):
    return [done.token_ids for done in engine.generate(PROMPTS, GREEDY)]


@pytest.mark.slow
@pytest.mark.parametrize("regrouping", [True, False])
@pytest.mark.parametrize("group_size", [1, 2, 4, 6, 100])
def test_tokens_do_not_depend_on_groups(offloaded, expected, group_size, regrouping):
    with Engine(
        offloaded, group_size=group_size, max_batch_size=6, max_step_tokens=12, regrouping=regrouping
    ) as engine:
        assert answers(engine) == expected
        stats = engine.stats()
        engine.check_integrity()
    assert stats["passes"] >= stats["steps"]
    assert (stats["passes"] > stats["steps"]) == (group_size < 6)
    assert (stats["regrouping"]["planned"] > 0) == (regrouping and group_size < 6)
    assert not offloaded.moeflow.observers


def test_no_group_has_more_sequences_than_allowed_and_all_decode_once_a_step(offloaded, monkeypatch):
    with Engine(offloaded, group_size=2) as engine:
        passes, forward = [], engine._runner._forward

        def seen(pieces):
            passes.append([piece.sequence.id for piece in pieces if piece.sequence.decoding])
            return forward(pieces)

        monkeypatch.setattr(engine._runner, "_forward", seen)
        for prompt in PROMPTS:
            engine.add(prompt, GREEDY)
        while not engine.finished:
            passes.clear()
            decoding = [one.id for one in engine._scheduler.running if one.decoding]
            engine.step()
            assert sorted(id for group in passes for id in group) == sorted(decoding)
            assert all(len(group) <= 2 for group in passes)


def test_a_pass_that_fails_leaves_no_observer_and_others_go_on(offloaded, expected, monkeypatch):
    with Engine(offloaded, group_size=2) as engine:
        forward, failed = engine._runner._forward, []

        def once(pieces):
            if len(pieces) > 1 and not failed:
                failed.append(True)
                with engine._groups.watching(pieces):
                    raise ExpertReadError("a disk that stumbles")
            return forward(pieces)

        monkeypatch.setattr(engine._runner, "_forward", once)
        assert answers(engine) == expected
        assert failed
        assert not offloaded.moeflow.observers


def test_groups_leave_other_observers_in_place_and_these_see_every_layer(offloaded, expected):
    class Layers:
        def __init__(self):
            self.seen = []

        def begin_pass(self, begun):
            pass

        def observe(self, layer, top_k_index, top_k_weights, hidden_states):
            self.seen.append(layer)

        def close(self):
            pass

    layers = Layers()
    with Engine(offloaded, group_size=2) as engine:
        offloaded.moeflow.observers.append(layers)
        assert answers(engine) == expected
        num_layers = offloaded.config.num_hidden_layers
        assert layers.seen == list(range(num_layers)) * engine.stats()["passes"]
    assert offloaded.moeflow.observers == [layers]


def test_a_sequence_that_fails_while_it_decodes_fails_alone(offloaded, expected, monkeypatch):
    with Engine(offloaded, group_size=2) as engine:
        forward, completions = engine._runner._forward, {}

        def failing(pieces):
            if any(piece.sequence.id == "2" and piece.sequence.decoding for piece in pieces):
                raise ExpertReadError("a disk that stumbles")
            return forward(pieces)

        monkeypatch.setattr(engine._runner, "_forward", failing)
        for place, prompt in enumerate(PROMPTS):
            engine.add(prompt, GREEDY, id=str(place))
        while not engine.finished:
            completions |= {one.id: one.completion for one in engine.step() if one.completion}
        assert completions.pop("2").error == "ExpertReadError: a disk that stumbles"
        assert [completions[id].token_ids for id in "01345"] == [*expected[:2], *expected[3:]]
        assert engine.stats()["regrouping"]["planned"] > 0


def threads_of_engines():
    """All threads but those that read experts, which are the model's and start as they are needed."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("moeflow-read")}


def test_a_closed_engine_leaves_no_thread_and_remembers_no_sequence(offloaded):
    before = threads_of_engines()
    engine = Engine(offloaded, group_size=2)
    answers(engine)
    assert len(engine._groups._scheduler._likely) == 0
    engine.close()
    assert threads_of_engines() == before


def test_groups_are_for_models_whose_experts_are_fetched(mixtral, offloaded):
    with pytest.raises(ConfigError, match="group_size is for models of load_moe"):
        Engine(mixtral, group_size=2)
    with pytest.raises(ConfigError, match="group_size=0"):
        Engine(offloaded, group_size=0)


def test_routes_of_a_pass_are_what_its_routers_chose_and_padding_is_none():
    routes = PassRoutes(2, 4)
    routes.observe(0, torch.tensor([[0, 3], [1, 4]]))
    routes.observe(1, torch.tensor([[2, 1], [2, 3]]))
    assert routes.take(2).tolist() == [[[0, 3], [2, 1]], [[1, 4], [2, 3]]]
    assert routes.take(2).size == 0
    routes.observe(0, torch.tensor([[0, 3]]))  # a layer that was given other tokens than the pass has
    routes.observe(1, torch.tensor([[2, 1], [2, 3]]))
    assert routes.take(2).tolist() == [[[4, 4], [2, 1]], [[4, 4], [2, 3]]]


def test_what_is_remembered_of_a_token_is_what_its_routers_chose(offloaded):
    prompts = [list(range(start, start + 5)) for start in range(10, 40, 5)]
    routes = PassRoutes(len(offloaded.moeflow.experts_per_layer), offloaded.moeflow.experts_per_layer[0])
    chosen = {}
    offloaded.moeflow.observers.append(routes)
    for prompt in prompts:
        offloaded(torch.tensor([prompt]))
        chosen |= dict(zip(prompt, routes.take(len(prompt)).tolist(), strict=True))
    offloaded.moeflow.observers.remove(routes)
    with Engine(offloaded, group_size=2, max_batch_size=6, max_step_tokens=12) as engine:  # several pieces in a pass
        engine.generate(prompts, SamplingParams(max_new_tokens=1))
        seen = engine._groups._scheduler._likely._tokens
        assert {token: route[-1].tolist() for token, route in seen.items()} == chosen
