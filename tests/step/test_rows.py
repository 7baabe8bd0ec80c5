"""Native steps of several sequences in `generate`: padded batches, beams, samples, and what lies between such steps."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, set_seed

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.hf.passes.caches.growing_cache import GrowingCache, GrowingLayer
from moeflow.kernels.cpu.library import instruction_set
from moeflow.step.bound import plan_memory
from moeflow.step.program import Buffer, Instruction, Operand, Program

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "model"
    tiny_mixtral().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eager(folder):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def model(folder):
    model = native(folder, "50%")
    with model.moeflow:
        yield model


def native(folder, budget):
    return load_moe(folder, expert_memory=budget, predictor=None, step="auto", device="cpu")


def batch_of(num_rows, padding=3):
    """Token ids [rows, 9] and a mask that hides up to `padding` - 1 of each on the left."""
    ids = torch.randint(3, 128, (num_rows, 9), generator=torch.Generator().manual_seed(num_rows))
    return ids, (torch.arange(9) >= torch.arange(num_rows)[:, None] % padding).long()


def answer(model, num_rows, padding=3, **options):
    """Token ids of a batch, logits, and how many steps ran natively."""
    ids, mask = batch_of(num_rows, padding)
    options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    step = getattr(getattr(model, "moeflow", None), "step", None)
    before = 0 if step is None else step.num_steps
    out = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits), 0 if step is None else step.num_steps - before


@pytest.mark.parametrize("num_rows", [2, 3, 8, 17, 32])
def test_batches_padded_on_the_left_have_transformers_logits(model, eager, num_rows):
    tokens, logits, num_steps = answer(model, num_rows)
    expected, expected_logits, _ = answer(eager, num_rows)
    assert torch.equal(tokens, expected)
    assert (logits - expected_logits).abs().max() <= 1e-5 * expected_logits.abs().max()
    assert num_steps == NUM_TOKENS - 1


def test_a_batch_larger_than_any_program_is_the_models_own(model, eager):
    tokens, _, num_steps = answer(model, 33)
    assert torch.equal(tokens, answer(eager, 33)[0])
    assert num_steps == 0


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_beams_and_samples_are_transformers(model, eager, options):
    set_seed(3)
    tokens, _, num_steps = answer(model, 2, **options)
    set_seed(3)
    assert torch.equal(tokens, answer(eager, 2, **options)[0])
    assert num_steps == NUM_TOKENS - 1


@pytest.mark.parametrize("padding", [1, 4])
def test_a_batch_has_the_bits_of_another_budget(folder, model, padding):
    small = native(folder, "15%")
    with small.moeflow:
        _, logits, num_steps = answer(small, 5, padding)
        small.moeflow.check_integrity()
    assert num_steps == NUM_TOKENS - 1
    assert torch.equal(logits, answer(model, 5, padding)[1])


def test_a_mask_with_a_hole_is_the_models_own(model, eager):
    ids, mask = batch_of(2)
    outs, steps = [], model.moeflow.step.num_steps
    for tested in (model, eager):
        cache = GrowingCache.of_model(model) if tested is model else DynamicCache(config=model.config)
        holes = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        with torch.no_grad():
            tested(input_ids=ids, attention_mask=mask, past_key_values=cache)
            holes[1, 5] = 0
            outs.append(tested(input_ids=ids[:, :1], attention_mask=holes, past_key_values=cache).logits)
    assert model.moeflow.step.num_steps == steps
    assert (outs[0] - outs[1]).abs().max() <= 1e-5 * outs[1].abs().max()


def test_an_assistant_and_its_target_agree_with_transformers(model, eager, folder):
    """The target's checks of several tokens are its own code, and its cache is cropped between native steps."""
    assistant = native(folder, "100%")
    assistant.generation_config.assistant_confidence_threshold = 0.0  # it drafts several tokens at once
    with assistant.moeflow:
        options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ids = batch_of(1)[0]
        made = model.generate(ids, assistant_model=assistant, **options)
        assert assistant.moeflow.step.num_steps > 10
    assert torch.equal(made, eager.generate(ids, **options))


def test_rows_of_a_cache_are_reordered_repeated_and_chosen_as_transformers_does():
    generator = torch.Generator().manual_seed(0)
    caches = [GrowingCache([GrowingLayer(), GrowingLayer()]), DynamicCache()]
    for layer in range(2):
        keys, values = torch.randn(2, 3, 2, 70, 4, generator=generator)
        for cache in caches:
            cache.update(keys, values, layer)
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_select_indices(torch.tensor([5, 1])),
        lambda cache: cache.update(torch.ones(2, 2, 1, 4), torch.zeros(2, 2, 1, 4), 0),
    ):
        for cache in caches:
            change(cache)
        for mine, its in zip(caches[0].layers, caches[1].layers, strict=True):
            assert torch.equal(mine.keys, its.keys)
            assert torch.equal(mine.values, its.values)


@pytest.mark.slow
def test_last_hidden_states_of_a_step_are_the_models_own(tmp_path):
    """This family scales the logits behind the head."""
    build_model(FAMILIES["granitemoe"]).save_pretrained(tmp_path)
    model = load_moe(tmp_path, device="cpu", expert_memory="100%", predictor=None)
    ids = torch.tensor([[5, 17, 99, 3, 42, 8]])
    with model.moeflow, torch.no_grad():
        made = model.generate(ids[:, :-1], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert model.moeflow.step.num_steps == 2
        expected = model.model(made[:, :-1]).last_hidden_state[0, -1:]
        assert torch.allclose(model.moeflow.step.last_hidden(), expected, atol=1e-4)


def test_what_the_head_read_is_written_over_by_nothing_behind_it():
    sizes = {"x": "input", "norm": "weight", "hidden": "made", "head": "weight", "logits": "made", "scaled": "made"}
    buffers = [Buffer(kind, name, 64) for name, kind in sizes.items()]
    x, norm, hidden, head, logits, scaled = (Operand(n, torch.float32, (1, 16), (16, 1), 0) for n in range(6))
    body = [
        Instruction("rms_norm", (hidden,), (x, norm)),
        Instruction("linear", (logits,), (hidden, head)),
        Instruction("pointwise", (scaled,), (logits,), {"op": "neg"}),
    ]
    program = Program(1, buffers, [], body, scaled)
    assert program.last_hidden == hidden
    offsets, _ = plan_memory(program)
    assert len({offsets[one.buffer] for one in (hidden, logits, scaled)}) == 3
