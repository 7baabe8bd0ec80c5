"""Native steps whose experts are missing: the same bits whatever is in memory; a model goes on after a fault."""

import os
import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.errors import ClosedModelError, ExpertReadError
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 64]])
NUM_TOKENS = 16
NUM_EXPERTS = 24  # of three layers, two for each token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misses") / "model"
    tiny_mixtral().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(folder):
    """Load the model; every one is closed after the tests."""
    made = []

    def load(**options):
        options = {"expert_memory": "30%", "predictor": None, "step": "auto", "device": "cpu", **options}
        made.append(load_moe(folder, **options))
        return made[-1]

    yield load
    for model in made:
        model.moeflow.close()


@pytest.fixture(scope="module")
def expected(load):
    return answer(load(expert_memory="100%"))


class BetweenSteps(LogitsProcessor):
    """Calls a function after each step with the number of the step, from 0 on."""

    def __init__(self, call):
        self.call, self.num_steps = call, 0

    def __call__(self, input_ids, scores):
        self.call(self.num_steps)
        self.num_steps += 1
        return scores


def answer(model, between=lambda step: None, num_tokens=NUM_TOKENS):
    """Logits of the tokens that a model generates greedily."""
    out = model.generate(
        PROMPT, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, logits_processor=LogitsProcessorList([BetweenSteps(between)]),
    )  # fmt: skip
    return torch.stack(out.logits)


def test_the_bits_are_the_same_whatever_is_in_memory_from_step_to_step(load, expected):
    """One model, whose limit changes as the memory governor changes it: all, fewer than one token needs, one."""
    model = load(expert_memory="100%", policy="lru")
    runtime = model.moeflow
    answer(model)

    def squeeze(step):
        runtime._residency.set_limit((1, NUM_EXPERTS, 2, 7, 1, 4)[step % 6])

    for _ in range(2):
        runtime.reset_stats()
        assert torch.equal(answer(model, squeeze), expected)
        decode = runtime.stats()["decode"]
        assert min(decode["hits"], decode["misses"], decode["evictions"]) > 0
        runtime.check_integrity()
    assert runtime.step.num_steps == 3 * (NUM_TOKENS - 1)
    assert runtime.step.seconds["experts"] > 0, "no layer went unasked"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lfu", "lfru", "static", "forecast"])
def test_the_bits_are_the_same_under_every_policy(load, expected, policy):
    model = load(policy=policy, predictor="lookahead" if policy == "forecast" else None)
    assert torch.equal(answer(model), expected)
    assert model.moeflow.step.num_steps == NUM_TOKENS - 1


def test_what_is_counted_is_what_the_models_own_steps_count(load):
    counted = {}
    for step in ("python", "auto"):
        model = load(step=step, policy="lru")
        runtime = model.moeflow
        answer(model, lambda step, runtime=runtime: runtime.reset_stats() if step == 0 else None)
        decode = runtime.stats()["decode"]
        counted[step] = {name: decode[name] for name in ("forwards", "tokens", "hits", "misses")}
        assert decode["decisions"]["layers_ready"] + decode["decisions"]["layers_waited"] > 0
    demands = {step: found.pop("hits") + found.pop("misses") for step, found in counted.items()}
    assert counted["auto"] == counted["python"] == {"forwards": NUM_TOKENS - 1, "tokens": NUM_TOKENS - 1}
    assert demands["auto"] == demands["python"] == (NUM_TOKENS - 1) * 3 * 2


def test_the_check_of_a_program_is_counted_nowhere(load):
    model = load()
    answer(model, num_tokens=2)
    stats = model.moeflow.stats()
    assert stats["step"]["steps"] == stats["decode"]["forwards"] == stats["prefill"]["forwards"] == 1


def test_a_step_whose_expert_cannot_be_read_may_be_run_again(load, expected):
    """The file is cut between two steps, then whole again; the cache of keys and values has lost and gained nothing."""
    model = load(expert_memory="13%")
    runtime, made = model.moeflow, []
    files = {file: (file.read_bytes(), file.stat()) for file in runtime.store.files}
    out = model.generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    cache, token = out.past_key_values, out.sequences[:, -1:]
    with torch.no_grad():
        for step in range(NUM_TOKENS - 2):
            if step % 4 == 1:
                for file in files:
                    os.truncate(file, 4096)
                with pytest.raises(ExpertReadError, match=r"expert \d+ of model\.layers\.\d+\.mlp\.experts"):
                    model(input_ids=token, past_key_values=cache, use_cache=True)
                assert cache.get_seq_length() == PROMPT.shape[1] + 1 + step
                runtime.check_integrity()
                for file, (data, about) in files.items():
                    with open(file, "r+b") as handle:
                        handle.write(data)
                    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
            before = runtime.step.num_steps
            made.append(model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1])
            assert runtime.step.num_steps == before + 1
            token = made[-1].argmax(-1, keepdim=True)
    assert torch.equal(torch.stack(made), expected[2:])


def test_pruning_holds_in_native_steps_when_it_is_set_before_them_and_after(load, expected):
    def first_alone(hidden_states, top_k_index, top_k_weights, num_experts):
        return torch.cat([top_k_index[:, :1], torch.full_like(top_k_index[:, 1:], num_experts)], 1), top_k_weights

    def prune(model):
        for layer in model.model.layers:
            layer.mlp.experts._moeflow.use(before=[first_alone])

    own, early, late = load(step="python"), load(), load(expert_memory="100%")
    answer(late)
    for model in (own, early, late):
        prune(model)
    pruned = answer(own)
    assert not torch.allclose(pruned, expected, rtol=1e-3)
    for model in (early, late):
        assert (answer(model) - pruned).abs().max() <= 1e-5 * pruned.abs().max()
    assert early.moeflow.step.num_steps == NUM_TOKENS - 1
    assert late.moeflow.step.num_steps == 2 * (NUM_TOKENS - 1)


def test_a_model_that_another_thread_closes_says_so(load):
    model, decoding, ended = load(), threading.Event(), []

    def generate():
        try:
            answer(model, lambda step: decoding.set() if step == 5 else None, num_tokens=2000)
        except ClosedModelError as error:
            ended.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    assert decoding.wait(60)
    model.moeflow.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(ended) == 1
    assert model.moeflow.step.num_steps >= 4
