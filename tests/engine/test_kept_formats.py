"""Keys and values kept in int8 and int4: answers depend on no piece, memory, sharing, restart or draft; refusals."""

import pytest
import torch

from helpers.engine_requests import GREEDY, answers, assert_empty, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.runner_passes import Passes
from helpers.small_models import tiny_mixtral
from helpers.window_models import windowed_model
from moeflow import Engine, SamplingParams, load_moe
from moeflow.engine.kv_cache.kv_format import FORMATS
from moeflow.engine.serial.choose_engine import engine_for
from moeflow.errors import ConfigError
from moeflow.kernels.cpu.library import instruction_set

needs_library = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
NAMES = list(FORMATS)
HEADS, FEATURES, LAYERS = 2, 48, 3
CLOSE = {"int8": 0.02, "int4": 0.2}  # of the greatest logit


def position_bytes(name):
    form = FORMATS[name]
    return LAYERS * HEADS * (form.key.record_bytes(FEATURES) + form.value.record_bytes(FEATURES))


@pytest.fixture(scope="module")
def model():
    return tiny_mixtral(head_dim=FEATURES)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The same model with native steps, int8 by its own option."""
    folder = tmp_path_factory.mktemp("kept") / "model"
    tiny_mixtral(head_dim=FEATURES).save_pretrained(folder)
    loaded = load_moe(folder, expert_memory="100%", predictor=None, device="cpu", kv_format="int8")
    yield loaded
    loaded.moeflow.close()


@pytest.fixture(scope="module")
def exact():
    """The same model in float64, where the shape of a product hardly ever moves a number over a code's border."""
    model = tiny_mixtral(head_dim=FEATURES).double()
    model.config._experts_implementation = "eager"  # others take no float64
    return model


@pytest.fixture(scope="module")
def expected(exact):
    """What each prompt is answered alone, in one piece, by format."""
    made = {}
    for name in NAMES:
        with Engine(exact, max_batch_size=1, share_prefixes=False, kv_format=name) as engine:
            made[name] = answers(engine)
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"max_step_tokens": 4}, {"max_step_tokens": 9, "share_prefixes": False}], ids=str)
def test_answers_are_the_same_whatever_pieces_batches_and_sharing(exact, expected, name, options):
    with Engine(exact, max_batch_size=4, kv_format=name, **options) as engine:
        for _ in range(2):
            assert answers(engine) == expected[name]
        assert (engine.stats()["shared_tokens"] > 0) == options.get("share_prefixes", True)
        assert_empty(engine)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4"])
def test_requests_that_grow_and_give_way_are_answered_as_alone(exact, name):
    prompts = [tokens(5 + 3 * seed, seed) for seed in range(4)]
    params = SamplingParams(max_new_tokens=90, ignore_eos=True)  # so that slots grow
    with Engine(exact, max_batch_size=1, kv_format=name) as engine:
        alone = answers(engine, prompts, params)
    tight = 170 * position_bytes(name)
    with Engine(exact, max_batch_size=4, kv_memory=tight, kv_format=name, share_prefixes=False) as engine:
        assert answers(engine, prompts, params) == alone
        stats = engine.stats()
        assert stats["preempted"] > 0
        assert stats["kv_peak_bytes"] <= tight
        assert_empty(engine)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_counted_by_the_records(model, name):
    with Engine(model, max_batch_size=2, kv_format=name, kv_memory=100 * position_bytes(name)) as engine:
        stats = engine.stats()
        assert (stats["kv_format"], stats["kv_position_bytes"]) == (name, position_bytes(name))
        assert stats["kv_positions"] == 100
        engine.add(tokens(20), GREEDY)
        engine.step()
        slot = next(iter(engine._memory._slots.values()))
        assert engine.stats()["kv_used_bytes"] == slot.num_positions * position_bytes(name)
    with Engine(model) as engine:
        assert engine.stats()["kv_format"] == "auto"
        assert engine.stats()["kv_position_bytes"] == LAYERS * 2 * HEADS * FEATURES * 4


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_lives_through_a_restart_in_its_own_format_alone(exact, expected, name, tmp_path):
    with Engine(exact, kv_format=name) as engine:
        assert answers(engine) == expected[name]
        saved = engine.save_kept(tmp_path)
        assert saved > 0
    with Engine(exact, kv_format=name) as engine:
        assert engine.load_kept(tmp_path) == saved
        assert answers(engine) == expected[name]
        assert engine.stats()["kept_hits"] > 0
    for other in {"auto", *NAMES} - {name}:
        with Engine(exact, kv_format=other) as engine:
            assert engine.load_kept(tmp_path) == 0
            answers(engine)
            assert engine.save_kept(tmp_path) > 0
    with Engine(exact, kv_format=name) as engine:
        assert engine.load_kept(tmp_path) == saved, "beside those of other formats"


def worst(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_close_to_those_of_the_models_dtype(name):
    made = {}
    calm = tiny_mixtral(head_dim=FEATURES, num_experts_per_tok=8, initializer_range=0.08)  # no route to be changed
    for one in ("auto", name):
        passes = Passes(calm, tokens(40, 1), kv_format=one)
        made[one] = torch.cat([passes.run(), passes.say(tokens(10, 2))])
    assert 0 < worst(made[name], made["auto"]) < CLOSE[name]


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_native_steps_read_and_write_the_same_records_as_the_models_own_code(native, model, name):
    ours, own = (Passes(one, tokens(40, 1), kv_format=name) for one in (native, model))
    assert worst(ours.run(), own.run()) < 1e-4
    found = ours.say(tokens(30, 2))
    assert ours.runner.was_native
    assert worst(found, own.say(tokens(30, 2))) < 0.1 * CLOSE[name]  # a code at its border may go either way
    slots = [passes.runner.memory["one"] for passes in (ours, own)]
    for layer in range(LAYERS):
        for mine, theirs in zip(*(slot.read(layer, 70) for slot in slots), strict=True):
            assert (mine - theirs).abs().max() <= theirs.abs().max() / (7 if name == "int4" else 127)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_draft_have_the_bits_of_single_steps(native, name):
    drafted, single = (Passes(native, tokens(21, 1), kv_format=name) for _ in range(2))
    assert torch.equal(drafted.run(), single.run())
    draft = tokens(7, 9)
    for word in tokens(5, 2):  # every draft is wrong
        drafted.sequence.append(word)
        found = drafted.run(tuple(draft))
        assert drafted.runner.was_native
        assert torch.equal(found[:1], single.say([word]))
    assert torch.equal(found[1:], single.say(draft))


@needs_library
@pytest.mark.slow
def test_speculation_answers_the_same_tokens(native):
    prompts = [[*tokens(6, 3) * 4], [*tokens(9, 4) * 3]]
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    found = {}
    for speculation in (None, {"gated": False, "most": 3}):
        with Engine(native, max_batch_size=2, speculation=speculation) as engine:
            found[speculation is None] = answers(engine, prompts, params)
            assert engine.stats()["kv_format"] == "int8", "the model's option"
            stats = engine.stats()["speculation"]
    assert found[True] == found[False]
    assert sum(source["accepted"] for source in stats["sources"].values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4"])
@pytest.mark.parametrize("step", ["python", pytest.param("auto", marks=needs_library)])
def test_windows_that_move_have_the_bits_of_those_that_stay(tmp_path, name, step):
    windowed_model(head_dim=16).save_pretrained(tmp_path)
    loaded = load_moe(tmp_path, expert_memory="100%", predictor=None, step=step, device="cpu")
    with loaded.moeflow:
        staying, moving = (Passes(loaded, tokens(16, 1), most_new=most, kv_format=name) for most in (None, 16))
        for passes in (staying, moving):
            passes.found = torch.cat([passes.run(), passes.say(tokens(150, 2))])
        assert torch.equal(moving.found, staying.found)
        assert moving.runner.memory["one"].in_window[0] > 0
        assert (step == "auto") == moving.runner.was_native


def test_models_that_keep_something_else_are_refused_by_name():
    with pytest.raises(ConfigError, match="keeps latents"):
        Engine(build_model(FAMILIES["deepseek_v2"]), kv_format="int8")
    with pytest.raises(ConfigError, match="head size 8 is no multiple of 16"):
        Engine(windowed_model(), kv_format="int4")
    with pytest.raises(ConfigError, match="runs one sequence at a time in its own cache"):
        engine_for(build_model(FAMILIES["jamba"]), kv_format="int8")
    engine_for(build_model(FAMILIES["jamba"]), kv_format="auto").close()


def test_formats_that_there_are_not_are_refused(mixtral, mixtral_folder):
    with pytest.raises(ConfigError, match="kv_format='int3' is unknown"):
        Engine(mixtral, kv_format="int3")
    with pytest.raises(ConfigError, match="kv_format='fp8' is unknown"):
        load_moe(mixtral_folder, kv_format="fp8")
