"""Decode steps over a memory that stays where it is: right values, the same bits however often a step is run."""

import copy

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from helpers.small_models import tiny_mixtral
from moeflow.hf.passes.caches.step_cache import StepCache, stepping
from moeflow.hf.passes.decode_call import give_caches
from moeflow.hf.passes.forward import describe_pass

GREEDY = "greedy_search"


def step_cache(model, mode=GREEDY, **settings):
    cache = DynamicCache(config=model.config)
    return StepCache.in_place_of(cache, model, GenerationConfig(**settings), mode)


def logits(model, cache, ids, mask=None):
    """Run a pass as a model with captured steps does; return its last logits, and whether it was a step."""
    given = {"input_ids": ids, "cache": cache, "attention_mask": mask}
    begun = describe_pass((), given)
    if not (begun.continues and begun.num_positions == 1):
        return model(**given).logits[:, -1], False
    with stepping(begun) as standing:
        return model(**given).logits[:, -1], standing is not None


@pytest.fixture(scope="module", params=("sdpa", "eager"))
def model(request):
    return tiny_mixtral(num_hidden_layers=2, attn_implementation=request.param)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padding", [0, 2])
def test_steps_have_the_values_of_a_cache_that_grows(window, padding):
    model = tiny_mixtral(num_hidden_layers=2, sliding_window=window)
    ids = torch.randint(1, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :padding] = 0
    own, standing = DynamicCache(config=model.config), step_cache(model)
    for begin, end in ((0, 5), *((place, place + 1) for place in range(5, 9))):
        want, _ = logits(model, own, ids[:, begin:end], mask[:, :end])
        got, was_step = logits(model, standing, ids[:, begin:end], mask[:, :end])
        assert was_step == (begin > 0)
        assert torch.allclose(got, want, atol=1e-5)
    assert standing.get_seq_length() == 9
    assert standing.layers[0].keys.shape[2] == 9


def test_a_step_that_is_run_again_has_the_same_bits(model):
    cache = step_cache(model)
    logits(model, cache, torch.tensor([[1, 2, 3]]))
    begun = describe_pass((), {"input_ids": torch.tensor([[4]]), "cache": cache})
    with stepping(begun):
        assert cache.may_run_again
        found = [model(input_ids=torch.tensor([[token]]), cache=cache).logits for token in (4, 5, 4)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert cache.get_seq_length() == 4
    assert not cache.may_run_again
    assert not cache.is_compileable


def test_a_step_that_fails_leaves_the_cache_as_it_was(model):
    cache, begun_ids = step_cache(model), torch.tensor([[4]])
    logits(model, cache, torch.tensor([[1, 2, 3]]))
    want, _ = logits(model, copy.deepcopy(cache), begun_ids)
    with pytest.raises(KeyboardInterrupt), stepping(describe_pass((), {"input_ids": begun_ids, "cache": cache})):
        raise KeyboardInterrupt
    assert cache.get_seq_length() == 3
    assert torch.equal(logits(model, cache, begun_ids)[0], want)


def test_memory_stays_where_it_is_and_moves_when_it_is_full():
    model = tiny_mixtral(num_hidden_layers=1, max_position_embeddings=1024)
    cache, ids = step_cache(model), torch.ones(1, 254, dtype=torch.int64)
    logits(model, cache, ids)
    found = []
    for _ in range(4):
        assert logits(model, cache, ids[:, :1])[1]
        found.append((cache.capacity, [one.data_ptr() for one in cache.memory]))
    assert [capacity for capacity, _ in found] == [256, 256, 512, 512]
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0][1][0] == found[2][1][0]  # the position stays
    assert found[1][1][1] != found[2][1][1]


@pytest.mark.parametrize(
    "change", [lambda cache: cache.crop(-2), lambda cache: cache.reorder_cache(torch.tensor([1, 0]))]
)
def test_a_cache_that_was_cut_or_reordered_goes_on_without_garbage(model, change):
    ids = torch.randint(1, 128, (2, 7), generator=torch.Generator().manual_seed(1))
    own, standing = DynamicCache(config=model.config), step_cache(model)
    for cache in (own, standing):
        logits(model, cache, ids[:, :6])
        if cache is standing:
            torch.empty(1 << 20).fill_(torch.nan)  # what a new memory may be found with
        change(cache)
    want, got = (logits(model, cache, ids[:, 6:]) for cache in (own, standing))
    assert got[1]
    assert torch.allclose(got[0], want[0], atol=1e-5)
    assert all(bool(one.isfinite().all()) for one in standing.memory)


def test_a_mask_of_four_dimensions_is_no_step(model):
    cache = step_cache(model)
    logits(model, cache, torch.tensor([[1, 2, 3]]))
    mask = torch.zeros(1, 1, 1, 4)
    assert not logits(model, cache, torch.tensor([[4]]), mask)[1]
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize(
    ("mode", "settings"), [("beam_search", {}), ("assisted_generation", {}), (GREEDY, {"output_attentions": True})]
)
def test_other_ways_to_generate_keep_their_cache(model, mode, settings):
    if settings:
        model = tiny_mixtral(num_hidden_layers=1, attn_implementation="eager")
    assert step_cache(model, mode, **settings) is None


def test_a_cache_of_other_layers_or_with_content_stays(model):
    full = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([[1]]), cache=full)
    assert StepCache.in_place_of(full, model, GenerationConfig(), GREEDY) is None
    assert StepCache.in_place_of(None, model, GenerationConfig(), GREEDY) is None


def test_generate_is_given_the_cache_but_for_beams():
    model, kinds = tiny_mixtral(num_hidden_layers=1), []
    give_caches(model, lambda cache, settings, mode: StepCache.in_place_of(cache, model, settings, mode))
    for beams in (1, 2):
        made = model.generate(
            torch.tensor([[1, 2]]), max_new_tokens=2, num_beams=beams, do_sample=False, return_dict_in_generate=True
        )
        cache = made.get("cache", made.get("past_key_values"))
        kinds.append(type(cache))
    assert kinds == [StepCache, DynamicCache]
