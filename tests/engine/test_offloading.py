"""An engine on offloaded experts: the same tokens, each expert fetched once a pass, failed reads told alone."""

import pytest
import torch

from helpers.engine_requests import GREEDY, PREFIX, PROMPTS, answers, assert_empty, generated
from moeflow import load_moe
from moeflow.core import ExpertKey
from moeflow.engine.engine import Engine
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError, ExpertReadError
from moeflow.loading.budget import ExpertsSize


@pytest.mark.slow
@pytest.mark.parametrize("predictor", [None, "auto"])
def test_offloaded_experts_give_the_same_tokens_and_are_fetched_once_a_step(mixtral_folder, expected, predictor):
    with load_moe(mixtral_folder, expert_memory="100%", predictor=None).moeflow as whole:
        least = ExpertsSize.of([source.layout for source in whole.store.layers], 2).min_bytes
    model = load_moe(mixtral_folder, expert_memory=least, predictor=predictor)
    with model.moeflow as runtime:
        engine = Engine(model, max_batch_size=6, max_step_tokens=64)
        runtime.reset_stats()
        assert answers(engine) == expected
        assert_empty(engine)
        runtime.check_integrity()
        stats, steps = runtime.stats(), engine.stats()["steps"]
        assert stats["decode"]["forwards"] + stats["prefill"]["forwards"] == steps
        assert stats["decode"]["tokens"] + stats["prefill"]["tokens"] == sum(
            engine.stats()[name] for name in ("prompt_tokens", "new_tokens")
        ) - len(PROMPTS)
        demands = sum(stats[phase][name] for phase in ("decode", "prefill") for name in ("hits", "misses"))
        assert demands <= steps * 3 * 8
        assert answers(engine, PROMPTS[:1]) == expected[:1]  # generate() and the engine take turns
        assert generated(model, PROMPTS[1]) == expected[1]


@pytest.mark.parametrize("groups", [{}, {"group_size": 2}], ids=["one pass", "groups"])
def test_in_a_pass_resident_experts_run_first_while_each_other_one_is_fetched_once(
    mixtral_folder, expected, monkeypatch, groups
):
    model = load_moe(mixtral_folder, expert_memory="50%", predictor=None)  # more slots than a layer has experts
    with model.moeflow as runtime, Engine(model, max_batch_size=6, **groups) as engine:
        cache, fetch, read, fetched, layers = runtime.cache, runtime.fetch, runtime.store.read, [], []
        table, whole = runtime.resident_table, []  # layers of which no expert is missing run in one call
        count, count_layer = table.count, table.count_layer

        def reading(key, record, **how):
            fetched.append(key)
            return read(key, record, **how)

        def watched(layer, experts, *rest, **options):
            keys, order, under_way = [ExpertKey(layer, expert) for expert in experts], [], []
            resident = {key.expert for key in keys if key in cache}
            fetched.clear()
            for batch in fetch(layer, experts, *rest, **options):
                order += [one.expert for one in batch]
                under_way.append(sum(key in cache.slots and key not in cache for key in keys))
                yield batch
            missing = set(experts) - resident
            assert set(order[: len(resident)]) == resident
            assert sorted(order) == sorted(experts)
            assert sorted(fetched) == [ExpertKey(layer, expert) for expert in sorted(missing)]
            assert not (resident and missing) or under_way[0], "no miss was on its way beside compute"
            layers.append(bool(resident and missing))

        monkeypatch.setattr(runtime.store, "read", reading)
        monkeypatch.setattr(runtime, "fetch", watched)

        def counting(layers, *about):
            before = len(whole)
            count(layers, *about)
            assert len(whole) in (before, before + len(layers))  # together, or each by itself
            whole[before:] = layers

        monkeypatch.setattr(table, "count", counting)
        monkeypatch.setattr(table, "count_layer", lambda *about: (whole.append(about[0]), count_layer(*about)))
        runtime.reset_stats()
        assert answers(engine) == expected
        assert len(layers) + len(whole) == 3 * engine.stats()["passes"]
        stats = runtime.stats()
        hidden = sum(stats[phase]["decisions"]["went_on_with_resident"] for phase in ("prefill", "decode"))
        assert hidden == sum(layers) > 10


def test_passes_are_told_by_sequence_only_while_these_stay_the_same(mixtral_folder, monkeypatch):
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime:
        engine, told, begin_forward = Engine(model, max_batch_size=2), [], runtime.begin_forward

        def heard(*shape, continues, token_ids):
            told.append((*shape, continues, None if token_ids is None else list(token_ids.shape)))
            begin_forward(*shape, continues=continues, token_ids=token_ids)

        monkeypatch.setattr(runtime, "begin_forward", heard)
        engine.add([*PREFIX, 5], SamplingParams(max_new_tokens=6, ignore_eos=True))
        engine.add([9], SamplingParams(max_new_tokens=3, ignore_eos=True))
        engine.add([*PREFIX, 6], SamplingParams(max_new_tokens=4, ignore_eos=True))
        while not engine.finished:
            engine.step()
        for prompts in ([[9, 8]], [[9], [8]]):
            answers(engine, prompts, SamplingParams(max_new_tokens=1))
    assert told == [
        (1, 20, False, None),
        (2, 1, True, [2, 1]),
        (2, 1, True, [2, 1]),
        (2, 1, True, None),  # the third took the place of the second
        (2, 1, True, [2, 1]),
        (2, 1, True, [2, 1]),
        (1, 1, True, None),
        (1, 2, False, None),
        (1, 2, False, None),
    ]


@pytest.mark.parametrize("predictor", ["markov", "lookahead"])
def test_a_predictor_beside_the_engine_neither_fails_nor_changes_a_token(mixtral_folder, expected, predictor):
    model = load_moe(mixtral_folder, expert_memory="50%", predictor=predictor)
    with model.moeflow as runtime:
        assert answers(Engine(model, max_batch_size=3)) == expected
        prediction = runtime.stats()["prediction"]
        assert prediction["failure"] is None
        assert prediction["steps_on"] + prediction["steps_off"] > 0
        runtime.check_integrity()


def test_a_trace_is_not_recorded_from_mixed_passes(mixtral_folder, tmp_path):
    model = load_moe(mixtral_folder, trace=tmp_path / "t.trace")
    with model.moeflow, pytest.raises(ConfigError, match="without trace="):
        Engine(model)


@pytest.mark.slow
def test_an_expert_that_cannot_be_read_fails_only_who_needs_it(mixtral_folder, expected, monkeypatch):
    model = load_moe(mixtral_folder, expert_memory="25%", predictor=None)
    with model.moeflow as runtime:
        store, read = runtime.store, runtime.store.read
        engine = Engine(model, max_batch_size=6)
        broken = set()

        def failing(key, record, **how):
            if key in broken:
                raise ExpertReadError(f"expert {key.expert} of layer {key.layer}: the disk failed")
            return read(key, record, **how)

        monkeypatch.setattr(store, "read", failing)
        failed = set()
        for layer in range(3):
            for expert in range(0, 8, 3):
                broken = {ExpertKey(layer, expert)}
                completions = engine.generate(PROMPTS, GREEDY)
                for place, completion in enumerate(completions):
                    if completion.finish_reason == "error":
                        assert "the disk failed" in completion.error
                        assert completion.token_ids == expected[place][: len(completion.token_ids)]
                        failed.add(place)
                    else:
                        assert completion.token_ids == expected[place]
                assert_empty(engine)
        assert failed, "no request met a broken expert"
        assert engine.stats()["finished"]["length"], "no request got past one"
        broken = set()
        assert answers(engine) == expected


def test_an_engine_starts_though_experts_of_the_first_tokens_cannot_be_read(mixtral_folder, expected, monkeypatch):
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime, torch.no_grad():
        model(torch.tensor([[0]]))
        broken = {key for key in runtime.cache.resident() if key.layer == 1}
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime:
        read = runtime.store.read

        def failing(key, record, **how):
            if key in broken:
                raise ExpertReadError("the disk failed")
            return read(key, record, **how)

        monkeypatch.setattr(runtime.store, "read", failing)
        with torch.no_grad(), pytest.raises(ExpertReadError):
            model(torch.tensor([[0]]))
        engine, broken = Engine(model), set()
        assert answers(engine) == expected
    model = load_moe(mixtral_folder, predictor=None)
    with model.moeflow as runtime:
        broken = {ExpertKey(2, expert) for expert in range(8)}
        read = runtime.store.read
        monkeypatch.setattr(runtime.store, "read", failing)
        with pytest.raises(ExpertReadError, match="the disk failed"):
            Engine(model)
