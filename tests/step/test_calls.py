"""Calls that a program does not answer, or answers in an unusual form: what transformers gives, errors as well."""

import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from helpers.native_steps import LENGTH, PROMPT, cache_after, compare, generate, go_on
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")

TOKEN = torch.tensor([[4]])
ONES = torch.ones(1, LENGTH, dtype=torch.long)
PADDED = (torch.arange(LENGTH) >= 3)[None]
HOLE = ONES.clone()
HOLE[0, 4] = 0
LAST_HIDDEN = ONES.clone()
LAST_HIDDEN[0, -1] = 0
FOUR_DIMENSIONS = torch.zeros(1, 1, 1, LENGTH)
FOUR_DIMENSIONS[..., 2] = -1e9
NATIVE = {
    "two tokens": {"input_ids": TOKEN.repeat(1, 2)},
    "eight tokens": {"input_ids": TOKEN.repeat(1, 8)},
    "keep one": {"logits_to_keep": 1},
    "keep more than there are": {"logits_to_keep": 5},
    "position ahead": {"position_ids": torch.tensor([[100]])},
    "position behind": {"position_ids": torch.tensor([[3]])},
    "position negative": {"position_ids": torch.tensor([[-5]])},
    "position without rows": {"position_ids": torch.tensor([12])},
    "mask": {"attention_mask": ONES},
    "mask of twos": {"attention_mask": 2 * ONES},
    "mask of truths": {"attention_mask": ONES.bool()},
    "padding as truths": {"attention_mask": PADDED},
    "padding as numbers": {"attention_mask": PADDED.float()},
    "padding and a negative number": {"attention_mask": torch.tensor([[0, -1, *[1] * (LENGTH - 2)]])},
    "token of 32 bits": {"input_ids": TOKEN.int()},
}
OWN = {
    "keep rows": {"logits_to_keep": torch.tensor([0, 0])},
    "keep none": {"logits_to_keep": torch.tensor([], dtype=torch.long)},
    "keep from behind": {"logits_to_keep": -1},
    "keep what is not there": {"logits_to_keep": torch.tensor([3])},
    "labels": {"labels": TOKEN},
    "position of half": {"position_ids": torch.tensor([[12.5]])},
    "hole": {"attention_mask": HOLE},
    "padding behind": {"attention_mask": LAST_HIDDEN},
    "nothing seen": {"attention_mask": 0 * ONES},
    "padding as mixed numbers": {"attention_mask": torch.tensor([[0, 2, 0, *[1] * (LENGTH - 3)]])},
    "short mask": {"attention_mask": ONES[:, 3:]},
    "long mask": {"attention_mask": torch.ones(1, LENGTH + 3, dtype=torch.long)},
    "mask of four dimensions": {"attention_mask": FOUR_DIMENSIONS},
    "mask of two sequences": {"attention_mask": ONES.repeat(2, 1)},
    "mask as a list": {"attention_mask": [[1] * LENGTH]},
    "token too high": {"input_ids": torch.tensor([[10**6]])},
    "token negative": {"input_ids": torch.tensor([[-1]])},
    "token of 16 bits": {"input_ids": TOKEN.short()},
    "token as float": {"input_ids": TOKEN.float()},
    "token as truth": {"input_ids": TOKEN.bool()},
    "token as a list": {"input_ids": [[4]]},
    "token without rows": {"input_ids": TOKEN[0]},
    "no token": {"input_ids": None},
    "empty tokens": {"input_ids": TOKEN[:, :0]},
    "nine tokens": {"input_ids": TOKEN.repeat(1, 9)},
    "two sequences": {"input_ids": TOKEN.repeat(2, 1)},
    "hidden states": {"output_hidden_states": True},
    "routers": {"output_router_logits": True},
    "attentions": {"output_attentions": True},
    "no cache wanted": {"use_cache": False},
}


def step(model, **arguments):
    """One step behind a cache, by hand."""
    out = model(**{"input_ids": TOKEN, "past_key_values": cache_after(model), **arguments})
    more = [out.get(name) or () for name in ("hidden_states", "router_logits", "attentions")]
    return [out.logits, *(tensor for group in more for tensor in group), torch.tensor(out.past_key_values is None)]


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_step_answers(pair, name):
    assert compare(pair, lambda model: step(model, **NATIVE[name])) == 2


@pytest.mark.parametrize("name", OWN)
def test_the_models_own_code_answers(pair, name):
    assert compare(pair, lambda model: step(model, **OWN[name])) == 1  # the first, of `generate`


@pytest.mark.parametrize("name", ["output_hidden_states", "output_router_logits", "output_attentions", "return_dict"])
def test_what_the_config_asks_for(pair, name):
    def ask(model):
        cache, before = cache_after(model), getattr(model.config, name)
        try:
            setattr(model.config, name, not before)
            return step(model, past_key_values=cache)
        finally:
            setattr(model.config, name, before)

    assert compare(pair, ask) == 1


def test_what_the_generation_config_asks_for(pair):
    def ask(model):
        model.generation_config.output_hidden_states = True
        try:
            out = model.generate(PROMPT, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True)
            return [out.sequences, *(hidden[-1] for hidden in out.hidden_states)]
        finally:
            model.generation_config.output_hidden_states = None

    assert compare(pair, ask) == 0


def test_embeddings_in_place_of_tokens(pair):
    def embed(model, ids):
        return model.get_input_embeddings()(ids)

    assert compare(pair, lambda model: step(model, input_ids=None, inputs_embeds=embed(model, TOKEN))) == 1
    assert compare(pair, lambda model: step(model, inputs_embeds=embed(model, TOKEN))) == 1  # both: refused
    assert compare(pair, lambda model: generate(model, None, inputs_embeds=embed(model, PROMPT))) == 7


def test_arguments_by_position_and_outputs_as_tuples(pair):
    def ask(model):
        cache = cache_after(model)
        out = model(TOKEN, None, None, cache)
        return [out.logits, model(input_ids=TOKEN, past_key_values=cache, return_dict=False)[0]]

    assert compare(pair, ask) == 1


@pytest.mark.parametrize(
    ("options", "native"),
    [
        ({"cache_implementation": "static"}, 0),
        ({"cache_implementation": "offloaded"}, 0),
        ({"cache_implementation": "quantized"}, 0),
        ({"cache_implementation": "dynamic"}, 7),
        ({"cache_implementation": "unknown"}, 0),
        ({"use_cache": False}, 0),
        ({"prefill_chunk_size": 3}, 9),
    ],
    ids=str,
)
def test_options_of_generate(pair, options, native):
    assert compare(pair, lambda model: generate(model, **options)) == native


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_the_callers(pair, kind):
    room = {"max_cache_len": 64} if kind is StaticCache else {}
    assert compare(pair, lambda model: generate(model, past_key_values=kind(config=model.config, **room))) == 0


def test_modes_of_torch_see_all_operations(pair):
    def ask(model):
        with FlopCounterMode(display=False) as counter:
            return [*generate(model), torch.tensor(counter.get_total_flops() > 0)]

    assert compare(pair, ask) == 0

    class Doubling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            made = function(*args, **kwargs or {})
            return made * 2 if function is torch.nn.functional.embedding else made

    with Doubling():
        assert compare(pair, generate) == 0


def test_inference_mode_a_default_device_and_a_kernel_of_attention_change_nothing(pair):
    def ask(model):
        with torch.inference_mode():
            return [tensor.clone() for tensor in generate(model)]

    assert compare(pair, ask) == 7
    with torch.device("cpu"), sdpa_kernel(SDPBackend.MATH):
        assert compare(pair, generate) == 7


def test_autocast_and_gradients_are_the_models_own(pair):
    before = pair.native.moeflow.step.num_steps
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*(generate(model)[0] for model in pair))
    assert pair.native.moeflow.step.num_steps == before

    cache = cache_after(pair.native)
    first, second, third = go_on(pair.native, cache)  # with gradients
    assert third.requires_grad
    with torch.no_grad():
        expected = go_on(pair.eager, cache_after(pair.eager)) + go_on(pair.eager, cache_after(pair.eager))
        made = [first, second, third, *go_on(pair.native, cache_after(pair.native))]
    for mine, its in zip(made, expected, strict=True):
        assert (mine - its).abs().max() <= 1e-5 * its.abs().max()


def test_another_default_dtype_changes_nothing(pair):
    torch.set_default_dtype(torch.float64)
    try:
        assert compare(pair, generate) == 7
    finally:
        torch.set_default_dtype(torch.float32)


def test_training_is_the_models_own(pair):
    def ask(model):
        try:
            return generate(model.train())
        finally:
            model.eval()

    assert compare(pair, ask) == 0


def test_a_compiled_model_answers(pair):
    def ask(model):
        return go_on(torch.compile(model, backend="eager"), cache_after(model), steps=2)

    assert compare(pair, ask) == 1
    torch._dynamo.reset()
    assert isinstance(pair.native.forward, types.FunctionType)
