"""Several tokens of one sequence in a step: the bits of as many steps of one, and what generate makes of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from moeflow import load_moe
from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 64]])
NEW = torch.tensor([[7, 21, 5, 17, 90, 3, 42, 11]])


@pytest.fixture
def load(mixtral_folder):
    made = []

    def load(**options):
        made.append(
            load_moe(mixtral_folder, **{"expert_memory": "100%", "predictor": None, "device": "cpu", **options})
        )
        made[-1].generate(PROMPT, max_new_tokens=2, do_sample=False, pad_token_id=0)  # the first step is compared
        return made[-1]

    yield load
    for model in made:
        model.moeflow.close()


@torch.no_grad()
def logits(model, counts, prompt=PROMPT, **options):
    """Logits of the new tokens, computed in calls of so many tokens; and the native steps that they took."""
    cache, found, at = GrowingCache.of_model(model), [], 0
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    before = model.moeflow.step.num_steps
    for count in counts:
        new = NEW[:, at : at + count]
        found.append(model(input_ids=new, past_key_values=cache, use_cache=True, **options).logits)
        at += count
        assert cache.get_seq_length() == prompt.shape[1] + at
    return torch.cat(found, 1), model.moeflow.step.num_steps - before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", ["100%", "25%"])
def test_they_have_the_bits_of_single_steps(load, dtype, budget):
    model = load(dtype=dtype, expert_memory=budget)
    alone, steps = logits(model, [1] * 8)
    assert steps == 8
    for counts in ([8], [2, 6], [3, 4, 1], [5, 3]):
        found, steps = logits(model, counts)
        assert torch.equal(found, alone), counts
        assert steps == len(counts)


@pytest.mark.parametrize("length", [57, 60, 63, 64, 121])
def test_room_is_made_for_all_of_them(load, length):
    model = load()
    prompt = torch.arange(length)[None] % 128
    assert torch.equal(logits(model, [8], prompt)[0], logits(model, [1] * 8, prompt)[0])


def test_the_logits_that_are_wanted_are_the_last(load):
    model = load()
    everything, _ = logits(model, [6])
    for keep in (1, 2, 5, 6, 9):
        found, steps = logits(model, [6], logits_to_keep=keep)
        assert torch.equal(found, everything[:, -keep:])
        assert steps == 1


def test_padding_on_the_left_is_not_seen(load):
    model = load()
    padded, mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT], 1), (torch.arange(16) >= 4).long()[None]
    with torch.no_grad():
        cache = GrowingCache.of_model(model)
        positions = torch.arange(-4, 12)[None].clamp(0)
        places = {"position_ids": positions[:, :11], "attention_mask": mask[:, :11]}
        model(input_ids=padded, past_key_values=cache, use_cache=True, **places)
        before = model.moeflow.step.num_steps
        places = {"position_ids": positions[:, 11:], "attention_mask": mask}
        found = model(input_ids=NEW[:, :5], past_key_values=cache, use_cache=True, **places).logits
    assert model.moeflow.step.num_steps == before + 1
    torch.testing.assert_close(found, logits(model, [5])[0], rtol=1e-5, atol=1e-5)


def test_more_of_one_and_several_of_two_are_the_models_own(load):
    model = load()
    with torch.no_grad():
        for prompt, new in ((PROMPT, NEW.repeat(1, 2)[:, :9]), (PROMPT.repeat(2, 1), NEW[:, :3].repeat(2, 1))):
            cache = GrowingCache.of_model(model)
            model(input_ids=prompt, past_key_values=cache, use_cache=True)
            before = model.moeflow.step.num_steps
            assert model(input_ids=new, past_key_values=cache, use_cache=True).logits.shape[:2] == new.shape
            assert model.moeflow.step.num_steps == before


def test_generate_verifies_drafts_natively_with_the_same_tokens(load, mixtral_folder):
    model = load(speculation="off")  # transformers' own candidates
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(PROMPT, **options)
    before = model.moeflow.step.num_steps
    assert torch.equal(model.generate(PROMPT, prompt_lookup_num_tokens=3, **options), expected)
    assert model.moeflow.step.num_steps > before
    assert {runner.num_rows for runner in model.moeflow.step.programs} >= {1, 4}
    assistant = AutoModelForCausalLM.from_pretrained(mixtral_folder).eval()
    assistant.generation_config.num_assistant_tokens, assistant.generation_config.assistant_confidence_threshold = 5, 0
    before = model.moeflow.step.num_steps
    assert torch.equal(model.generate(PROMPT, assistant_model=assistant, **options), expected)
    assert 0 < model.moeflow.step.num_steps - before < 15  # the model is its own assistant: all is accepted
    model.moeflow.check_integrity()


def test_a_model_whose_tokens_see_those_behind_them_runs_them_itself(load, monkeypatch):
    own = MixtralForCausalLM.forward

    def both_ways(self, input_ids=None, **kwargs):
        out = own(self, input_ids=input_ids, **kwargs)
        if input_ids.shape[1] > 1:  # what is said of a token depends on the last one
            out.logits = out.logits + out.logits[:, -1:]
        return out

    monkeypatch.setattr(MixtralForCausalLM, "forward", both_ways)
    model = load()
    found, steps = logits(model, [5])
    assert steps == 0
    assert not torch.equal(found[:, :4], logits(model, [1] * 5)[0][:, :4])
