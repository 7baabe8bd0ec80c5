"""Online pruning: what is skipped, what is kept, and what calibration finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.calibration.pruning_thresholds import calibrate_pruning
from moeflow.errors import ConfigError
from moeflow.kernels.pruning import find_threshold, protected_tokens, prune


def routes(num_tokens, top_k, num_experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator) ** 3
    weights, index = scores.topk(top_k)
    return index, weights / weights.sum(-1, keepdim=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_what_is_skipped_is_under_the_threshold_and_the_sum_stays(num_tokens, top_k, threshold, seed):
    index, weights = routes(num_tokens, top_k, seed=seed)
    kept, scaled = prune(index, weights, threshold, num_experts=8)
    skipped = kept == 8
    assert torch.equal(skipped, weights < threshold * weights.amax(-1, keepdim=True))
    assert torch.equal(kept[~skipped], index[~skipped])
    assert not scaled[skipped].any()
    torch.testing.assert_close(scaled.sum(-1), weights.sum(-1))
    assert not skipped[:, 0].any()


def test_protected_token_keeps_its_experts_and_every_bit_of_its_weights():
    index, weights = routes(6, 2)
    protected = torch.tensor([True, False] * 3)
    kept, scaled = prune(index, weights, 1.0, protected, num_experts=8)
    assert torch.equal(kept[protected], index[protected])
    assert torch.equal(scaled[protected], weights[protected])
    assert (kept[~protected, 1] == 8).all()


def test_threshold_of_zero_changes_nothing():
    index, weights = routes(5, 4)
    kept, scaled = prune(index, weights, 0.0, num_experts=8)
    assert torch.equal(kept, index)
    assert torch.equal(scaled, weights)


def test_rank_without_an_expert_stays_none_and_weighs_nothing():
    kept, scaled = prune(torch.tensor([[3, 9]]), torch.tensor([[0.4, 0.6]]), 0.5, num_experts=8)
    assert kept.tolist() == [[3, 8]]
    assert scaled[0].tolist() == pytest.approx([0.4, 0.0])


def test_token_with_no_expert_at_all_gives_no_nan():
    kept, scaled = prune(torch.tensor([[8, 8]]), torch.tensor([[0.0, 0.0]]), 0.5, num_experts=8)
    assert kept.tolist() == [[8, 8]]
    assert scaled.tolist() == [[0.0, 0.0]]


def test_weights_that_do_not_sum_to_one_keep_their_sum():
    _, scaled = prune(torch.tensor([[1, 2]]), torch.tensor([[2.0, 0.5]]), 0.5, num_experts=8)
    assert scaled.tolist() == [[2.5, 0.0]]


@pytest.mark.parametrize("top_k", [2, 4])
def test_calibrated_threshold_skips_the_share_asked_for(top_k):
    index, weights = routes(1000, top_k)
    found = find_threshold(torch.rand(1000, 4), weights, skipped_share=0.3)
    kept, _ = prune(index, weights, found.ratio, num_experts=8)
    assert (kept == 8).sum().item() == pytest.approx(0.3 * 1000 * (top_k - 1), abs=2)


def test_share_of_tokens_asked_for_is_protected():
    hidden_states = torch.randn(1000, 16)
    found = find_threshold(hidden_states, routes(1000, 2)[1], protected_share=0.02)
    assert protected_tokens(hidden_states, found.norm).sum() == pytest.approx(20, abs=1)


def test_one_expert_a_token_leaves_nothing_to_skip():
    index, weights = routes(50, 1)
    found = find_threshold(torch.rand(50, 4), weights)
    assert torch.equal(prune(index, weights, found.ratio, num_experts=8)[0], index)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_threshold_that_is_no_share_is_refused(threshold):
    with pytest.raises(ConfigError, match="Give 0"):
        prune(*routes(2, 2), threshold, num_experts=8)


def test_calibration_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="there are none"):
        find_threshold(torch.empty(0, 4), torch.empty(0, 2))


def test_every_layer_of_a_model_gets_a_threshold_and_no_hook_stays(mixtral):
    found = calibrate_pruning(mixtral, [list(range(64)), list(range(64, 128))])
    assert len(found) == mixtral.config.num_hidden_layers
    assert all(0 < threshold.ratio < 1 and threshold.norm > 0 for threshold in found)
    assert not any(module._forward_pre_hooks for module in mixtral.modules())
