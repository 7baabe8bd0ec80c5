"""What all policies have in common: exact inside their budget, one answer whatever the pieces; options and refusals."""

import pytest
import torch

from helpers.engine_requests import GREEDY, answers, assert_empty, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.runner_passes import Passes
from helpers.small_models import tiny_mixtral
from helpers.window_models import WINDOW, windowed_model
from moeflow import Engine, SamplingParams, load_moe
from moeflow.chat.answerer import Answerer
from moeflow.engine.kv_cache.policies.choosing import policy_of
from moeflow.engine.serial.choose_engine import engine_for
from moeflow.errors import ConfigError

SMALL = {
    "sinks": {"name": "sinks", "sinks": 2, "window": 10},
    "heavy_hitters": {"name": "heavy_hitters", "budget": 12, "recent": 4, "block": 4},
    "pages": {"name": "pages", "page": 4, "pages": 4},
}
WIDE = {
    "sinks": {"name": "sinks", "sinks": 4, "window": 60},
    "heavy_hitters": {"name": "heavy_hitters", "budget": 64, "recent": 8, "block": 40},
    "pages": {"name": "pages", "page": 4, "pages": 16},
}
NAMES = list(SMALL)
LONG = [tokens(40 + 9 * seed, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model():
    return tiny_mixtral()


@pytest.fixture(scope="module")
def exact():
    """The same model in float64, where the shape of a product hardly ever decides anything."""
    model = tiny_mixtral().double()
    model.config._experts_implementation = "eager"  # others take no float64
    return model


def passes(model, prompt, option, most_new=64, **options):
    return Passes(model, prompt, most_new=most_new, policy=policy_of(option, model), **options)


@pytest.mark.parametrize("kv_format", ["auto", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_inside_the_budget_every_bit_is_that_without_a_policy(model, name, kv_format):
    prompt, words = tokens(40, 1), tokens(24, 2)
    found = []
    for option in (None, WIDE[name]):
        made = passes(model, prompt, option, kv_format=kv_format)
        found.append(torch.cat([made.begin(16), made.say(words)]))
    assert torch.equal(*found)
    assert not torch.equal(made.say(tokens(20, 3)), passes(model, prompt + words, None).say(tokens(20, 3))), "beyond it"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("windowed", [False, True])
def test_logits_depend_on_no_piece(exact, name, windowed):
    model, prompt = windowed_model().double() if windowed else exact, tokens(61, 1)
    if windowed:
        model.config._experts_implementation = "eager"
    found = [
        torch.cat([made.begin(most), made.say(tokens(20, 2))])
        for most in (1, 7, 64)
        for made in [passes(model, prompt, SMALL[name])]
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)
    plain = passes(model, prompt, None)
    assert (torch.cat([plain.begin(64), plain.say(tokens(20, 2))]) - found[0]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_answers_depend_on_no_batch_and_no_memory(exact, name):
    with Engine(exact, max_batch_size=1, kv_policy=SMALL[name]) as engine:
        alone = answers(engine, LONG)
        position = engine.stats()["kv_position_bytes"]
    with Engine(exact, max_batch_size=3, max_step_tokens=11, kv_policy=SMALL[name]) as engine:
        assert answers(engine, LONG) == alone
        assert_empty(engine)
    prompts = [tokens(5 + 3 * seed, seed) for seed in range(2)]
    params = SamplingParams(max_new_tokens=90, ignore_eos=True)
    found = []
    for kv_memory in (1000 * position, 145 * position):
        with Engine(exact, max_batch_size=3, max_step_tokens=11, kv_policy=WIDE[name], kv_memory=kv_memory) as engine:
            found.append(answers(engine, prompts, params))
            assert engine.stats()["kv_peak_bytes"] <= kv_memory
            assert_empty(engine)
    assert found[0] == found[1]
    assert engine.stats()["preempted"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_off_is_told_and_shared_only_where_nothing_is_forgotten(model, name):
    with Engine(model, kv_policy=SMALL[name], speculation={"packed": True}) as engine:
        first = answers(engine, LONG)
        assert answers(engine, LONG) == first
        stats = engine.stats()
        told = stats["kv_policy"]
        assert SMALL[name].items() <= told.items()
        assert 0 < told["attended_share"] < 1
        forgets = name != "pages"
        assert ({"native_steps", "speculation"} | ({"share_prefixes"} if forgets else set())) == told["off"].keys()
        assert (stats["shared_tokens"] == 0) == forgets
        assert stats["speculation"]["reason"].startswith(f"the policy {name} acts")
    with Engine(model) as engine:
        assert engine.stats()["kv_policy"] is None


def test_pages_are_kept_through_a_restart_under_their_own_policy_alone(exact, tmp_path):
    with Engine(exact, kv_policy=SMALL["pages"]) as engine:
        expected = answers(engine, LONG)
        saved = engine.save_kept(tmp_path)
    for option, count in ((SMALL["pages"], saved), (None, 0), ({**SMALL["pages"], "pages": 5}, 0)):
        with Engine(exact, kv_policy=option) as engine:
            assert engine.load_kept(tmp_path) == count
            if count:
                assert answers(engine, LONG) == expected
                assert engine.stats()["kept_hits"] == len(LONG)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_that_fails_runs_again_with_the_same_bits(model, name):
    disturbed, calm = (passes(model, tokens(50, 1), SMALL[name]) for _ in range(2))
    layer, failures = model.model.layers[2].mlp, []

    def fail(module, inputs):
        if len(failures) % 3 == 0:  # one pass of two: the one that runs again does not fail
            failures.append(1)
            raise RuntimeError("no")
        failures.append(1)

    expected = torch.cat([calm.begin(7), calm.say(tokens(12, 2))])
    hook = layer.register_forward_pre_hook(fail)
    try:
        found = torch.cat([disturbed.begin(7), disturbed.say(tokens(12, 2))])
    finally:
        hook.remove()
    assert disturbed.runner.num_retries > 3
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["sinks", "heavy_hitters"])
def test_layers_with_a_window_keep_their_own_rule(name):
    made = passes(windowed_model(), tokens(60, 1), SMALL[name], most_new=16)
    made.begin(16)
    made.say(tokens(90, 2))
    slot = made.runner.memory["one"]
    windowed = [layer for layer, shape in slot.layout.items() if shape.window]
    assert windowed
    assert slot.in_window[0] > 0, "the windows have moved on"
    assert slot.in_window[1] - slot.in_window[0] >= WINDOW
    assert slot.forgotten > 0
    assert made.runner.memory.sizes.rows(10**6) < 100


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("streaming", "kv_policy='streaming' is unknown. Allowed: None, sinks, heavy_hitters, pages"),
        ({"sinks": 4}, "kv_policy=None is unknown"),
        (7, "kv_policy=7 is no policy"),
        ("sinks:window", "'window' where a size belongs: write it as \"sinks:SIZE=NUMBER"),
        ("sinks:window=-3", "'window=-3' where a size belongs"),
        ({"name": "sinks", "window": 0}, 'kv_policy="sinks" has window=0: give a whole number, at least 1'),
        ({"name": "sinks", "sinks": -1}, "sinks=-1"),
        ({"name": "sinks", "window": True}, "window=True"),
        ({"name": "sinks", "budget": 9}, "has no 'budget': give some of sinks, window"),
        ({"name": "heavy_hitters", "budget": 8, "recent": 8}, "give a budget of at least 9, or a smaller recent"),
        ({"name": "pages", "pages": 3}, "pages=3: give at least 4"),
    ],
)
def test_options_that_there_are_not_are_refused_with_what_is_allowed(mixtral, mixtral_folder, option, told):
    for refused in (lambda: Engine(mixtral, kv_policy=option), lambda: load_moe(mixtral_folder, kv_policy=option)):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert told in str(caught.value)


def test_the_models_option_is_that_of_its_engines(mixtral_folder):
    loaded = load_moe(mixtral_folder, predictor=None, device="cpu", kv_policy="sinks:sinks=2,window=10")
    with loaded.moeflow:
        with Engine(loaded) as engine:
            assert SMALL["sinks"].items() <= engine.stats()["kv_policy"].items()
            answers(engine, LONG)
            assert loaded.moeflow.stats()["step"]["steps"] == 0, "no native steps"
        with Engine(loaded, kv_policy=None) as engine:
            assert engine.stats()["kv_policy"] is None


def test_models_that_keep_something_else_are_refused_by_name():
    for name in NAMES:
        with pytest.raises(ConfigError, match=f'kv_policy="{name}" is not possible: this model keeps latents'):
            Engine(build_model(FAMILIES["deepseek_v2"]), kv_policy=name)
        with pytest.raises(ConfigError, match="runs one sequence at a time in its own cache"):
            engine_for(build_model(FAMILIES["jamba"]), kv_policy=name)
    engine_for(build_model(FAMILIES["jamba"]), kv_policy=None).close()


def test_a_chat_that_no_engine_can_answer_says_so_in_place_of_answering_without_a_policy():
    model = build_model(FAMILIES["deepseek_v2"])
    vars(model)["_moeflow_kv_policy"] = "sinks"
    with pytest.raises(ConfigError, match="keeps latents"):
        Answerer(model, None).stream(torch.tensor([[5, 6]]), GREEDY)
    model = tiny_mixtral()
    vars(model)["_moeflow_kv_policy"] = "sinks"
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ConfigError, match="kv_policy='sinks' is obeyed by engines, and generate"):
        Answerer(model, None).stream(torch.tensor([[5, 6]]), GREEDY)


def test_nothing_is_asked_of_a_request_that_ends_early(model):
    with Engine(model, kv_policy=SMALL["heavy_hitters"], max_step_tokens=32) as engine:
        id = engine.add(LONG[2], GREEDY)
        engine.step()
        assert engine.cancel(id)
        engine.step()
        assert_empty(engine)
