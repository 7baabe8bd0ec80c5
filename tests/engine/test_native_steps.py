"""Passes in which every sequence decodes run as native steps: transformers' numbers, the same bits at any budget."""

import pytest
import torch

from helpers.small_models import tiny_mixtral
from moeflow import Engine, SamplingParams, load_moe
from moeflow.engine.model_runner import ModelRunner
from moeflow.engine.sequence import Piece
from moeflow.errors import ExpertReadError
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "model"
    tiny_mixtral().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(folder):
    """Load the model, with each set of options once: a capture takes longer than a test."""
    made = {}

    def load(**options):
        options = {"expert_memory": "100%", "predictor": None, "step": "auto", "device": "cpu", **options}
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = load_moe(folder, **options)
        return made[key]

    yield load
    for model in made.values():
        model.moeflow.close()


def native_steps(model, run, *args):
    """What a call returns, and how many steps ran natively in it."""
    before = model.moeflow.step.num_steps
    return run(*args), model.moeflow.step.num_steps - before


def prompts_of(num_sequences):
    generator = torch.Generator().manual_seed(num_sequences)
    return [torch.randint(3, 128, (3 + i % 7,), generator=generator).tolist() for i in range(num_sequences)]


class Passes:
    """Sequences that a runner computes pass by pass."""

    def __init__(self, model, prompts, num_tokens=NUM_TOKENS):
        self.runner = ModelRunner(model, 1 << 24)
        self.sequences = [self.runner.sequence(str(i), prompt, num_tokens) for i, prompt in enumerate(prompts)]
        for sequence in self.sequences:
            assert self.runner.memory.admit(sequence)

    def run(self, sequences=None):
        """Run one pass over what is uncomputed; logits [S, V]."""
        pieces = [Piece(one, one.uncomputed(1000), True) for one in sequences or self.sequences]
        computed = self.runner.run(pieces)
        assert all(one.error is None for one in computed), computed
        for piece, one in zip(pieces, computed, strict=True):
            piece.sequence.num_computed += len(piece.tokens)
            piece.sequence.append(int(one.logits.argmax()))
        return torch.cat([one.logits for one in computed])


def logits_of(model, prompts):
    """Logits of passes over all sequences, [passes, S, V]."""
    passes = Passes(model, prompts)
    return torch.stack([passes.run() for _ in range(NUM_TOKENS)])


@pytest.mark.parametrize("num_sequences", [1, 2, 5, 8, 13, 32])
def test_logits_are_those_of_the_models_own_code(load, num_sequences):
    prompts = prompts_of(num_sequences)
    found, num_steps = native_steps(load(), logits_of, load(), prompts)
    expected = logits_of(load(step="python"), prompts)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert num_steps == NUM_TOKENS - 1


def test_a_pass_of_one_sequence_has_the_bits_of_generate(load):
    model, (prompt,) = load(), prompts_of(1)
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(torch.tensor([prompt]), output_logits=True, return_dict_in_generate=True, **options)
    found, num_steps = native_steps(model, logits_of, model, [prompt])
    assert torch.equal(found, torch.stack(made.logits))
    assert num_steps == NUM_TOKENS - 1


def test_up_to_eight_rows_have_the_bits_that_each_has_alone(load):
    alone = [Passes(load(), prompts_of(8)) for _ in range(2)]
    for passes in alone:
        for sequence in passes.sequences:  # the prompts, each in a pass of its own
            passes.run([sequence])
    together, one_by_one = alone
    for _ in range(NUM_TOKENS - 1):
        found = torch.cat([one_by_one.run([sequence]) for sequence in one_by_one.sequences])
        assert torch.equal(together.run(), found)


def test_bits_are_the_same_at_any_budget_and_number_of_threads(load):
    prompts = prompts_of(11)
    expected = logits_of(load(), prompts)
    for budget in ("40%", "15%"):
        model = load(expert_memory=budget)
        found, num_steps = native_steps(model, logits_of, model, prompts)
        assert torch.equal(found, expected), budget
        assert num_steps == NUM_TOKENS - 1
        model.moeflow.check_integrity()
    torch.set_num_threads(2)
    try:
        assert torch.equal(logits_of(load(), prompts), expected)
    finally:
        torch.set_num_threads(1)


def bits_of_slot(passes, sequence):
    """The keys of a sequence in a layer, as bits: memory that was never written may hold NaN."""
    return passes.runner.memory[sequence.id].keys[1].clone().view(torch.int32)


def test_dead_rows_write_nothing_and_take_no_expert(load):
    counted = []
    for tested in (load(expert_memory="40%"), load(expert_memory="40%", step="python")):
        passes = Passes(tested, prompts_of(8))
        for _ in range(3):
            passes.run()
        kept = [bits_of_slot(passes, one) for one in passes.sequences[5:]]
        tested.moeflow.reset_stats()
        passes.run(passes.sequences[:5])  # by the program of eight rows
        decode = tested.moeflow.stats()["decode"]
        counted.append((decode["hits"] + decode["misses"], decode["tokens"], decode["forwards"]))
        for one, keys in zip(passes.sequences[5:], kept, strict=True):
            assert torch.equal(bits_of_slot(passes, one), keys)
    assert counted[0] == counted[1]


def test_passes_with_prompts_are_the_models_own_and_answers_do_not_change(load):
    prompts = [[*prompt, *range(20, 40)] for prompt in prompts_of(9)]
    params = SamplingParams(max_new_tokens=12)
    with Engine(load(step="python"), max_batch_size=4, max_step_tokens=16) as own:
        expected = [completion.token_ids for completion in own.generate(prompts, params)]
    with Engine(load(), max_batch_size=4, max_step_tokens=16) as engine:
        completions, num_steps = native_steps(load(), lambda: list(engine.generate(prompts, params)))
    assert [completion.token_ids for completion in completions] == expected
    assert 0 < num_steps < engine.stats()["steps"] == own.stats()["steps"]


def test_groups_of_a_step_are_native_passes(load):
    answers, model, params = [], load(expert_memory="40%"), SamplingParams(max_new_tokens=12)
    for options in ({}, {"group_size": 4}):
        with Engine(model, max_batch_size=8, **options) as engine:
            completions, num_steps = native_steps(model, lambda: list(engine.generate(prompts_of(8), params)))
            answers.append([completion.token_ids for completion in completions])
    assert answers[0] == answers[1]
    assert num_steps > 2 * 10
    assert engine.stats()["regrouping"]["active"] > 0


def test_an_expert_that_cannot_be_read_fails_a_pass_that_can_be_run_again(load, monkeypatch):
    expected = logits_of(load(), prompts_of(3))
    model = load(expert_memory="15%")
    passes = Passes(model, prompts_of(3))
    found = [passes.run()]
    runs, experts = [], model.model.layers[1].mlp.experts._moeflow
    fetch = model.moeflow.fetch

    def failing(layer, *args, **kwargs):
        runs.append(layer)
        if layer == 1 and runs.count(1) <= 1:
            raise ExpertReadError("gone")
        return fetch(layer, *args, **kwargs)

    monkeypatch.setattr(experts.runtime, "fetch", failing)
    found += [passes.run() for _ in range(NUM_TOKENS - 1)]
    monkeypatch.undo()
    assert passes.runner.num_retries == 1
    worst = (torch.stack(found) - expected).abs().max()
    assert worst <= 1e-5 * expected.abs().max()


def test_a_hook_and_autocast_are_noticed(load):
    model, prompts = load(), prompts_of(3)
    passes = Passes(model, prompts)
    passes.run()
    _, num_steps = native_steps(model, passes.run)
    assert num_steps == 1
    seen = []
    hook = model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    _, num_steps = native_steps(model, passes.run)
    hook.remove()
    assert seen
    assert num_steps == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert native_steps(model, passes.run)[1] == 0
    assert native_steps(model, passes.run)[1] == 1


def test_a_model_that_scales_by_the_length_runs_its_own_code(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_mixtral(max_position_embeddings=32, head_dim=16, rope_parameters=rope).save_pretrained(tmp_path)
    answers = []
    for step in ("python", "auto"):
        model = load_moe(tmp_path, expert_memory="100%", predictor=None, device="cpu", step=step)
        with model.moeflow, Engine(model, max_batch_size=4) as engine:
            completions = engine.generate(prompts_of(4), SamplingParams(max_new_tokens=45))
            answers.append([completion.token_ids for completion in completions])
    assert answers[0] == answers[1]
    assert model.moeflow.step.num_steps == 0
