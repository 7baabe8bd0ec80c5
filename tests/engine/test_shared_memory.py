"""`load_moe(memory=)`: experts and the keys and values of engines in one budget, whatever runs and however it ends."""

import gc
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.engine_requests import GREEDY, NEW, PREFIX, PROMPTS, answers, assert_empty, generated, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.window_models import windowed_model
from moeflow import Engine, SamplingParams, load_moe
from moeflow.chat.answerer import Answerer
from moeflow.chat.figures import plan_lines, stats_table
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.engine.sequence import Sequence
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.errors import BudgetError, ClosedModelError, ConfigError, UnsupportedModelError
from moeflow.formatting import format_bytes
from moeflow.hf.pretrained import load_tokenizer

EXPERT = 73728  # bytes of one of the tiny Mixtral's 24
LEAST = 3 * EXPERT
POSITION = 768 + 128  # bytes, with what a copy of one layer's keys takes
LONG = SamplingParams(max_new_tokens=120, ignore_eos=True)
LONG_PROMPTS = [tokens(20, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def windowed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windowed")
    windowed_model().save_pretrained(folder)
    return folder


def both_bytes(runtime):
    """Return what experts and keys and values take now."""
    memory = runtime.stats()["memory"]
    return memory["device_bytes"] + memory["key_value_bytes"]


class Sampled(TorchDispatchMode):
    """Adds up, at every allocation of keys and values, what there is of them and of experts."""

    MADE = ("empty", "new_empty", "clone", "new_zeros")

    def __init__(self, runtime):
        super().__init__()
        self._runtime = runtime
        self.alive = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.MADE and made.ndim == 4:
            key = id(made)
            self.alive[key] = made.nbytes
            weakref.finalize(made, self.alive.pop, key)
            experts = self._runtime.cache.used * self._runtime._unit_bytes
            self.most = max(self.most, sum(self.alive.values()) + experts)
        return made


def live(memory, model, seed):
    """Let sequences come, grow, give way, end and come back, with passes of the model between."""
    rng, names = random.Random(seed), map(str, range(10**6))
    same, running = [tokens(80, 1), tokens(80, 2)], []
    prompts = [rng.choice(same)[: rng.randrange(20, 80)] + tokens(rng.randrange(5, 60), one) for one in range(12)]
    for number in range(200):
        if number % 4 == 0:  # the experts take what there is for them
            with torch.no_grad():
                model(torch.tensor([tokens(40, number)]))
        action = rng.random()
        if action < 0.25:
            one = Sequence(next(names), list(rng.choice(prompts)), 100)
            if memory.admit(one):
                running.append(one)
                if not one.begun and (count := memory.num_kept(one)):
                    memory.share(None, one, count)
                    one.num_computed = count
        elif action < 0.85 and running:
            one = rng.choice(running)
            if one.num_computed < one.length:
                one.num_computed = min(one.length, one.num_computed + 16)
            elif one.length < one.num_positions:
                one.token_ids.append(5)
            while one in running and not memory.grow(one):
                memory.preempt(running[-1], one)
                running.pop()
        elif running:
            one = running.pop(rng.randrange(len(running)))
            (memory.keep if rng.random() < 0.8 else memory.free)(one)
        memory.check_integrity()
        yield
    memory.clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "share", "seed", "on_disk"),
    [
        ("mixtral_folder", 0.5, 0, False),
        ("mixtral_folder", 1, 1, False),
        ("windowed_folder", 1.1, 0, False),
        ("windowed_folder", 2, 1, False),
        ("windowed_folder", 1.1, 0, True),
    ],
)
def test_at_every_allocation_both_together_are_within_the_budget(request, tmp_path, family, share, seed, on_disk):
    folder = request.getfixturevalue(family)
    with load_moe(folder, expert_memory="100%", predictor=None).moeflow as runtime:
        whole = runtime.stats()["memory"]["all_experts_bytes"]
    total = int(share * whole)
    model = load_moe(folder, memory=total, predictor=None)
    kept = {"kept_folder": tmp_path} if on_disk else {}
    with model.moeflow as runtime, Engine(model, max_step_tokens=32, **kept) as engine:
        with Sampled(runtime) as sampled:
            for _ in live(engine._memory, model, seed):
                assert both_bytes(runtime) <= total
                if on_disk:
                    disk = engine._memory.disk
                    disk.writer.waiting.join()
                    read = disk.stats()["read_tokens"]
        assert not on_disk or read > 100
        assert total // 2 < sampled.most <= total
        runtime.check_integrity()


@pytest.fixture(scope="module")
def expected_long(mixtral):
    return [generated(mixtral, prompt, 120) for prompt in LONG_PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("total", [24 * EXPERT + 40 * POSITION, 9 * EXPERT, LEAST + 300 * POSITION])
def test_tokens_are_the_same_at_every_memory(mixtral_folder, expected, expected_long, total):
    model = load_moe(mixtral_folder, memory=total, predictor=None)
    with model.moeflow as runtime, Engine(model, max_batch_size=6, max_step_tokens=64) as engine:
        assert answers(engine) == expected
        assert answers(engine, LONG_PROMPTS, LONG) == expected_long
        assert_empty(engine)
        memory = runtime.stats()["memory"]
        assert memory["shared_peak_bytes"] <= memory["shared_budget_bytes"] == total
        runtime.check_integrity()


def test_experts_leave_while_a_conversation_grows_and_come_back_when_it_is_dropped(mixtral_folder):
    total = 16 * EXPERT
    model = load_moe(mixtral_folder, memory=total, predictor=None)
    with model.moeflow as runtime:
        assert runtime.cache.limit == 16
        limits = []
        with Engine(model) as engine:
            engine.add(PREFIX, SamplingParams(max_new_tokens=230, ignore_eos=True))
            while not engine.finished:
                engine.step()
                limits.append(runtime.cache.limit)
        assert limits == sorted(limits, reverse=True)
        assert limits[-1] < limits[0]
        assert runtime.stats()["memory"]["key_value_bytes"] == 0
        generated(model, PREFIX, 1)
        assert runtime.cache.limit == 16


def test_no_sequence_gives_way_while_more_experts_than_the_fewest_are_there(mixtral_folder):
    model = load_moe(mixtral_folder, memory=LEAST + 4 * EXPERT, predictor=None)
    with model.moeflow as runtime, Engine(model, max_batch_size=8) as engine:
        memory, sequences = engine._memory, [Sequence(str(number), tokens(30, number), 200) for number in range(2)]
        assert all(map(memory.admit, sequences))
        limits = []
        while True:
            for one in sequences:
                one.token_ids.append(5)
            limits.append(runtime.cache.limit)
            if not all(map(memory.grow, sequences)):
                break
        assert limits[0] > 3
        assert runtime.cache.limit == 3
        assert memory.budget_bytes - memory._room.taken() < 2 * 64 * POSITION
        for one in sequences:
            memory.free(one)
        assert runtime.stats()["memory"]["key_value_bytes"] == 0


@pytest.mark.slow
def test_what_gave_way_for_want_of_memory_goes_on_to_the_same_tokens(mixtral_folder, expected_long):
    total = LEAST + 260 * POSITION
    model = load_moe(mixtral_folder, memory=total, predictor=None)
    with model.moeflow as runtime, Engine(model, max_batch_size=5) as engine:
        assert answers(engine, LONG_PROMPTS, LONG) == expected_long
        assert engine.stats()["preempted"]
        assert runtime.stats()["memory"]["shared_peak_bytes"] <= total


def test_two_engines_share_and_what_one_holds_another_is_told_of(mixtral_folder, expected):
    total = LEAST + 260 * POSITION
    model = load_moe(mixtral_folder, memory=total, predictor=None)
    with model.moeflow as runtime, Engine(model) as one, Engine(model) as other:
        assert answers(one) == expected
        assert answers(other, PROMPTS[:2]) == expected[:2]
        assert both_bytes(runtime) <= total
        one.add(tokens(180), GREEDY, id="long")
        one.step()
        refused = other.generate([tokens(120, 9)], GREEDY)[0]
        assert refused.finish_reason == "error"
        assert "other engines on this model hold" in refused.error
        one.cancel("long")
        one.close()
        assert answers(other, [tokens(120, 9)]) == [generated(model, tokens(120, 9))]


@pytest.mark.parametrize("end", ["cancel", "close", "collect", "model"])
def test_however_requests_end_all_is_given_back(mixtral_folder, end):
    model = load_moe(mixtral_folder, memory=12 * EXPERT, predictor=None)
    budget = model.moeflow.governor
    with model.moeflow as runtime:
        engine = Engine(model, share_prefixes=False)
        for number, prompt in enumerate(PROMPTS):
            engine.add(prompt, LONG, id=str(number))
        engine.step()
        engine.step()
        assert budget.key_value_bytes > 0
        if end == "cancel":
            for number in range(len(PROMPTS)):
                engine.cancel(str(number))
            engine.step()
            assert_empty(engine)
        elif end == "close":
            engine.close()
        elif end == "model":
            runtime.close()
            with pytest.raises(ClosedModelError):
                engine.step()
            engine.close()
        else:
            del engine
            gc.collect()
        assert budget.key_value_bytes == 0


def test_an_allocation_that_fails_gives_back_what_it_took(mixtral_folder, monkeypatch):
    model = load_moe(mixtral_folder, memory=12 * EXPERT, predictor=None)
    with model.moeflow as runtime, Engine(model) as engine:

        def without_memory(*args):
            raise RuntimeError("no memory")

        monkeypatch.setattr(KeyValueSlot, "empty", without_memory)
        refused = engine.generate([PREFIX], GREEDY)[0]
        assert refused.error.startswith("no memory for keys and values")
        assert runtime.governor.key_value_bytes == 0
        monkeypatch.undo()
        assert engine.generate([PREFIX], GREEDY)[0].token_ids == generated(model, PREFIX, NEW)


@pytest.mark.slow
def test_a_conversation_of_long_ago_leaves_for_experts_that_are_waited_for_and_stays_where_all_are_there(
    mixtral_folder,
):
    kept = []
    for total in (LEAST + 300 * POSITION, 24 * EXPERT + 800 * POSITION):
        model = load_moe(mixtral_folder, memory=total, predictor=None)
        with model.moeflow, Engine(model) as engine:
            generated(model, tokens(200), 1)
            answers(engine, [tokens(60)], LONG)
            tree = engine._memory.kept
            tree.keep(None, tokens(50, 1), KeyValueSlot.empty(engine._memory.sizes.layout, 50))
            for node in tree._by_use:
                node.used_s -= 1e15
            engine._memory._room.settle()
            answers(engine, [tokens(20, 2)], LONG)
            kept.append(tree.common(None, tokens(50, 1)))
    assert kept == [0, 50]


def test_what_was_saved_comes_back_as_far_as_there_is_room(mixtral_folder, tmp_path):
    with load_moe(mixtral_folder, memory=24 * EXPERT, predictor=None).moeflow as runtime:
        assert runtime.cache.limit == 24
    model = load_moe(mixtral_folder, memory=24 * EXPERT + 600 * POSITION, predictor=None)
    with model.moeflow, Engine(model) as engine:
        for seed in range(4):
            answers(engine, [tokens(100, seed)])
        assert engine.save_kept(tmp_path) > 400
    total = LEAST + 260 * POSITION
    model = load_moe(mixtral_folder, memory=total, predictor=None)
    with model.moeflow as runtime, Engine(model) as engine:
        loaded = engine.load_kept(tmp_path)
        assert 100 <= loaded < 260
        engine.check_integrity()
        assert both_bytes(runtime) <= total
        assert runtime.cache.limit < 6


def test_a_request_that_fits_beside_no_expert_is_refused_with_both_sizes(mixtral_folder):
    model = load_moe(mixtral_folder, memory=LEAST + 257 * POSITION, predictor=None)
    with model.moeflow, Engine(model, max_batch_size=2) as engine:
        model.config.max_position_embeddings = 4096
        error = Engine(model).generate([tokens(250)], LONG)[0].error
        assert f"memory={LEAST + 257 * POSITION:,} bytes leaves {257 * POSITION:,} to them" in error
        model.config.max_position_embeddings = 256
        assert engine.generate([tokens(100)], LONG)[0].error is None


def test_one_conversation_may_take_the_whole_context_and_is_kept_beside_the_next_turn(mixtral_folder):
    model = load_moe(mixtral_folder, memory=24 * EXPERT + 800 * POSITION, predictor=None)
    with model.moeflow, Engine(model, max_batch_size=1) as engine:
        first = engine.generate([tokens(200)], SamplingParams(max_new_tokens=20, ignore_eos=True))[0]
        second = engine.generate([tokens(200) + first.token_ids], SamplingParams(max_new_tokens=36, ignore_eos=True))[0]
        assert len(second.token_ids) == 36
        assert second.cached_tokens >= 200


def test_too_little_is_refused_before_anything_is_loaded_with_both_minima(mixtral_folder):
    least = LEAST + 256 * POSITION
    with pytest.raises(BudgetError, match=f"experts take {LEAST:,} bytes .3 slots.*256 positions {256 * POSITION:,}"):
        load_moe(mixtral_folder, memory=least - 1)
    with load_moe(mixtral_folder, memory=least, predictor=None).moeflow:
        pass


def test_other_budgets_beside_it_are_refused(mixtral_folder, mixtral):
    model = load_moe(mixtral_folder, memory="2MB", predictor=None)
    with model.moeflow:
        with pytest.raises(ConfigError, match=r"memory=2,000,000, which .* share\. Drop kv_memory"):
            Engine(model, kv_memory="1MB")
        with pytest.raises(ConfigError, match="Load with expert_memory and kv_memory in its place"):
            SerialEngine(model)
    assert Engine(mixtral).stats()["kv_budget_bytes"] <= 2 << 30


def test_a_family_that_keeps_other_states_is_refused_when_it_is_loaded(tmp_path):
    build_model(FAMILIES["lfm2_moe"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="keeps other state than keys and values"):
        load_moe(tmp_path, memory="1GB")


def test_chat_answers_in_the_shared_budget(speaking_folder):
    model = load_moe(speaking_folder, memory=3 << 20, predictor=None)
    with model.moeflow as runtime:
        answerer = Answerer(model, load_tokenizer(speaking_folder))
        stream = answerer.stream(torch.tensor([tokens(40, below=50)]), GREEDY)
        list(stream)
        memory = runtime.stats()["memory"]
        assert memory["key_value_bytes"] > 0
        told = [format_bytes(memory[name]) for name in ("device_bytes", "key_value_bytes")]
        assert plan_lines(runtime.snapshot()) == f"experts {told[0]}, keys and values {told[1]} now, of 3 MiB"
        assert any("keys and values" in cell for cell in stats_table(runtime.snapshot()).columns[0].cells)
