"""Caches that callers take from an answer and go on with by hand, copied, cropped, mixed up: as transformers does."""

import copy
import pickle

import pytest
import torch

from helpers.native_steps import cache_after, compare, go_on
from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")

FIRST = 5  # native steps of `cache_after(model, 6)`


def cropped(model):
    cache = cache_after(model, 6)
    for layer in cache.layers:
        layer.crop(torch.tensor(-3))  # as assisted decoding of transformers 5.17 does
    assert type(cache.get_seq_length()) is int
    made = go_on(model, cache)
    cache.crop(0)
    return made + go_on(model, cache, 9)


def deeply_copied(model):
    cache = cache_after(model, 6)
    made = go_on(model, cache)
    copied = copy.deepcopy(cache)
    return made + go_on(model, copied, 9) + go_on(model, cache, 11) + go_on(model, copied, 2)


def deeply_copied_and_the_original_gone(model):
    cache = cache_after(model, 6)
    made = go_on(model, cache)
    copied = copy.deepcopy(cache)
    del cache
    others = [torch.randn(1, 2, 64, 16) for _ in range(50)]  # in the memory that became free
    return made + go_on(model, copied, 9) + others[:0]


def layers_copied(model):
    cache = cache_after(model, 6)
    made = go_on(model, cache)
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return made + go_on(model, copied, 9) + go_on(model, cache, 11) + go_on(model, copied, 3)


def pickled(model):
    cache = cache_after(model, 6)
    out = model(input_ids=torch.tensor([[4]]), past_key_values=cache)
    again = pickle.loads(pickle.dumps(out))
    return [again.logits, *go_on(model, again.past_key_values, 9), *go_on(model, cache, 9)]


def keys_that_a_caller_holds(model):
    cache = cache_after(model, 6)
    keys = cache.layers[0].keys
    before = keys.clone()
    cache.crop(-3)
    return [*go_on(model, cache), keys, before]


def keys_that_a_caller_gave(model):
    cache = cache_after(model, 6)
    mine = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for layer, (keys, values) in zip(cache.layers, mine, strict=True):
        layer.keys, layer.values = keys, values
    cache.crop(-3)
    return [*go_on(model, cache), mine[0][0], mine[2][1]]


def repeated_and_selected(model):
    cache = cache_after(model, 6)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([1]))
    return go_on(model, cache)


def begun_anew(model):
    cache = cache_after(model, 6)
    cache.reset()
    return go_on(model, cache)


def layers_exchanged(model):
    one, other = cache_after(model, 6), cache_after(model, 6)
    go_on(model, one)
    go_on(model, other, 9)
    one.layers, other.layers = other.layers, one.layers
    return go_on(model, one, 7) + go_on(model, other, 8)


def interleaved(model):
    one, other, made = cache_after(model, 4), cache_after(model, 5), []
    for turn in range(4):
        made += go_on(model, one, 3 + turn, 1) + go_on(model, other, 9 + turn, 1)
    return made


def of_inference_mode(model):
    with torch.inference_mode():
        cache = cache_after(model, 6)
        made = [tensor.clone() for tensor in go_on(model, cache)]
    return made + go_on(model, cache) + go_on(model, cache, output_hidden_states=True)


@pytest.mark.parametrize(
    ("ask", "native"),
    [
        (cropped, FIRST + 6),
        (deeply_copied, FIRST + 12),
        (deeply_copied_and_the_original_gone, FIRST + 6),
        (layers_copied, FIRST + 12),
        (pickled, FIRST + 7),
        (keys_that_a_caller_holds, FIRST + 3),
        (keys_that_a_caller_gave, FIRST + 3),
        (repeated_and_selected, FIRST + 3),
        (begun_anew, FIRST + 2),
        (layers_exchanged, 2 * FIRST + 12),
        (interleaved, 3 + 4 + 8),
        (of_inference_mode, FIRST + 6),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_native_steps_go_on_with_it(pair, ask, native):
    assert compare(pair, ask) == native


def cropped_by_a_positive_number(model):
    cache_after(model, 6).crop(3)


def of_more_sequences(model):
    cache = cache_after(model, 6)
    cache.batch_repeat_interleave(3)
    return go_on(model, cache)


def one_layer_cropped(model):
    cache = cache_after(model, 6)
    cache.layers[1].crop(-2)
    return go_on(model, cache)


def one_layer_gone(model):
    cache = cache_after(model, 6)
    del cache.layers[-1]
    return go_on(model, cache)


def one_layer_empty(model):
    cache = cache_after(model, 6)
    cache.layers[1].reset()
    return go_on(model, cache, steps=1)


def of_another_dtype(model):
    cache = cache_after(model, 6)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    return go_on(model, cache)


def of_fewer_heads(model):
    cache = cache_after(model, 6)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :1], layer.values[:, :1]
    return go_on(model, cache)


@pytest.mark.parametrize(
    "ask",
    [
        cropped_by_a_positive_number, of_more_sequences, one_layer_cropped, one_layer_gone, one_layer_empty,
        of_another_dtype, of_fewer_heads,
    ],
)  # fmt: skip
def test_the_models_own_code_answers_or_refuses(pair, ask):
    assert compare(pair, ask) == FIRST


def test_gradients_flow_through_steps_behind_a_cache(pair):
    """Each step keeps what the one before it wrote, as torch.cat does: the backward pass of both finds it unchanged."""
    cache = cache_after(pair.native)
    inputs = pair.native.get_input_embeddings()(torch.tensor([[4]])).detach().requires_grad_()
    layer = pair.native.model.layers[0].self_attn
    rotary = pair.native.model.rotary_emb(inputs, torch.tensor([[9]]))
    first, _ = layer(inputs, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
    layer(inputs, position_embeddings=rotary, attention_mask=None, past_key_values=cache)
    first.sum().backward()
    assert inputs.grad.abs().sum() > 0


@pytest.mark.parametrize(("other", "native"), [({"initializer_range": 0.1}, 3), ({"num_key_value_heads": 4}, 0)])
def test_a_cache_of_another_model(pair, tmp_path, other, native):
    """Of the same shapes it is gone on with; of other shapes the model refuses it, as transformers' does."""
    eager = tiny_mixtral(**other)
    eager.save_pretrained(tmp_path)
    loaded = load_moe(tmp_path, device="cpu", expert_memory="100%", predictor=None, step="auto")
    caches = {pair.eager: cache_after(eager, 1), pair.native: cache_after(loaded, 1)}
    loaded.moeflow.close()
    del loaded  # the cache lives on
    assert compare(pair, lambda model: go_on(model, caches[model])) == native
