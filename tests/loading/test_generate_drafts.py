"""Drafts of generate: the tokens and bits of calls without, and what the gate lets through."""

import gc
import os
import random
import shutil
import threading
import weakref

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from moeflow import Engine, load_moe
from moeflow.errors import ExpertReadError
from moeflow.kernels.cpu.library import instruction_set
from moeflow.policy.lookup.looked_up_text import LookedUpText

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 64]])
AGAIN = PROMPT.repeat(1, 3)  # what comes next was said before
PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def load(mixtral_folder):
    made = []

    def load(folder=mixtral_folder, **options):
        options = {"expert_memory": "100%", "predictor": None, "device": "cpu", **options}
        made.append(load_moe(folder, **options))
        return made[-1]

    yield load
    for model in made:
        model.moeflow.close()


class Says(LogitsProcessor):
    """Lets a model say tokens, whatever it computes; calls a function with the number of tokens before each."""

    def __init__(self, tokens, between=lambda length: None):
        self.tokens, self.between = tokens, between

    def __call__(self, input_ids, scores):
        self.between(input_ids.shape[1])
        said = torch.full_like(scores, -torch.inf)
        said[:, self.tokens[(input_ids.shape[1] - AGAIN.shape[1]) % len(self.tokens)]] = 0.0
        return said


def says(tokens, **options):
    return {"logits_processor": LogitsProcessorList([Says(tokens, **options)]), "max_new_tokens": len(tokens)}


def looked_up(num_tokens, *, right):
    """Tokens that a lookup foresees each time; or three of them in such an order that it is wrong each time."""
    text, said, draw = LookedUpText(), [], random.Random(0)
    text.read(AGAIN[0].tolist())
    while len(said) < num_tokens:
        foreseen = text.behind(1)[0]
        said += foreseen if right else draw.sample(sorted({5, 17, 99} - set(foreseen)), 1)
        text.read(said[-1:])
    return said


def generate(model, most=7, prompt=AGAIN, **options):
    lookup = {} if most is None else {"prompt_lookup_num_tokens": most}
    return model.generate(prompt, **{**PLAIN, "max_new_tokens": 60, **lookup, **options})


def counts(model):
    stats = model.moeflow.stats()["speculation"]
    return stats["sources"]["prompt_lookup"], stats


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", ["100%", "25%"])
def test_tokens_and_logits_have_the_bits_of_a_call_without(load, dtype, budget):
    model = load(dtype=dtype, expert_memory=budget)
    for options in ({}, says(looked_up(60, right=True))):
        plain, drafted = (generate(model, most, **options, **LOGITS) for most in (None, 7))
        assert torch.equal(drafted.sequences, plain.sequences)
        assert torch.equal(torch.stack(drafted.logits), torch.stack(plain.logits))
    source, stats = counts(model)
    assert source["accepted"] > 7
    assert stats["speculated_steps"] > 0
    model.moeflow.check_integrity()


def test_the_first_pass_has_no_draft_and_the_number_is_the_callers(load):
    model, said = load(), looked_up(40, right=True)
    for most in (3, 10):
        before = counts(model)[0]["proposed"], model.moeflow.stats()["decode"]["forwards"]
        found = generate(model, most, **says(said))
        assert found[0, AGAIN.shape[1] :].tolist() == said
        proposed = counts(model)[0]["proposed"] - before[0]
        steps = model.moeflow.stats()["decode"]["forwards"] - before[1]
        assert 0 < proposed <= min(most, 7) * steps
    assert {runner.num_rows for runner in model.moeflow.step.programs} <= {1, 2, 4, 8}
    assert model.moeflow.step.num_steps == model.moeflow.stats()["decode"]["forwards"]


@pytest.mark.slow
def test_drafts_that_are_always_wrong_are_cut_to_none(load):
    model, said = load(), looked_up(200, right=False)
    for _ in range(3):
        assert generate(model, **says(said))[0, AGAIN.shape[1] :].tolist() == said
    source, stats = counts(model)
    assert 0 < source["proposed"] < 300, "each of 600 steps has seven without the gate"
    assert source["accepted"] == 0
    assert stats["plain_steps"] > 300


@pytest.mark.slow
def test_a_call_that_samples_draws_as_without_the_gate(load):
    found = []
    for speculation in ("auto", "off"):
        model = load(speculation=speculation)
        torch.manual_seed(7)
        found.append(generate(model, 3, do_sample=True, temperature=0.7))
    assert torch.equal(*found)


@pytest.mark.slow
def test_answers_end_where_they_do_without(load):
    model = load()
    whole = generate(model, None)[0, AGAIN.shape[1] :].tolist()
    generate(model)
    for end in {*whole[5:40:3]}:
        plain, drafted = (generate(model, most, eos_token_id=end) for most in (None, 7))
        assert torch.equal(drafted, plain)
    for length in range(8, 20):
        plain, drafted = (generate(model, most, max_new_tokens=length) for most in (None, 7))
        assert torch.equal(drafted, plain)


@pytest.mark.parametrize("option", ["off", None, {"most": 3}])
def test_a_model_that_was_loaded_without_keeps_the_candidates_of_transformers(load, option):
    model = load(speculation=option)
    assert "_get_candidate_generator" not in vars(model)
    assert model.moeflow.stats()["speculation"] is None


def test_steps_that_are_the_models_own_keep_the_candidates_of_transformers(load):
    model, python = load(), load(step="python")
    assert python.moeflow.stats()["speculation"] is None
    handle = model.register_forward_hook(lambda *_: None)
    for options in ({}, {"output_hidden_states": True, "return_dict_in_generate": True}):
        model.moeflow.reset_stats()
        generate(model, **options, **says(looked_up(40, right=True)))
        assert 5 <= model.moeflow.stats()["decode"]["forwards"] < 20, "passes of eight tokens"
        assert counts(model)[0]["proposed"] == 0
        assert model.moeflow.step.num_steps == 0
        handle.remove()


def test_an_engine_has_a_gate_of_its_own_and_says_the_same_of_it(load):
    model = load()
    with Engine(model) as engine:
        theirs = engine.stats()["speculation"]
        generate(model, **says(looked_up(40, right=True)))
        source, stats = counts(model)
        assert stats.keys() == theirs.keys()
        assert source.keys() == theirs["sources"]["prompt_lookup"].keys()
        assert source["accepted"] > 0
        assert engine.stats()["speculation"] == theirs


def test_an_expert_that_cannot_be_read_for_a_draft_leaves_the_model_as_it_was(load, tmp_path, mixtral_folder):
    folder = shutil.copytree(mixtral_folder, tmp_path / "model")
    model = load(folder=folder, expert_memory="25%")
    said = looked_up(60, right=True)
    expected = generate(model, **says(said), **LOGITS)
    runtime, broken = model.moeflow, []
    files = {file: (file.read_bytes(), file.stat()) for file in runtime.store.files}

    def cut(length):
        if length == AGAIN.shape[1] + 30:
            broken.append(length)
            for file in files:
                os.truncate(file, 4096)

    with pytest.raises(ExpertReadError):
        generate(model, **says(said, between=cut))
    assert broken
    runtime.check_integrity()
    for file, (data, about) in files.items():
        file.write_bytes(data)
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    found = generate(model, **says(said), **LOGITS)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


def test_calls_in_two_threads_have_their_own_drafts(load):
    model, found = load(), {}
    answers = {number: looked_up(60, right=right) for number, right in enumerate((True, False, True))}
    threads = [
        threading.Thread(target=lambda number=number: found.update({number: generate(model, **says(answers[number]))}))
        for number in answers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: out[0, AGAIN.shape[1] :].tolist() for number, out in found.items()} == answers
    source, stats = counts(model)
    assert 0 < source["accepted"] <= source["proposed"]
    assert stats["plain_steps"] + stats["speculated_steps"] <= model.moeflow.step.num_steps


def test_a_model_without_a_name_is_gone_at_once(mixtral_folder):
    model = load_moe(mixtral_folder, expert_memory="100%", predictor=None, device="cpu")
    generate(model, **says(looked_up(40, right=True)))
    gc.collect()
    behind = weakref.ref(model.moeflow)
    gc.disable()
    try:
        del model
        assert behind() is None
    finally:
        gc.enable()
