"""Tokens sampled with drafts have the distribution of the model's own probabilities: a chi-square test of 20,000."""

import itertools
from collections import Counter

import pytest
import torch

from helpers.engine_requests import tokens
from helpers.small_models import tiny_mixtral
from helpers.told_drafts import always, use
from moeflow import Engine, SamplingParams

TOP, ANSWERS, LENGTH = 5, 32, 626
CRITICAL = 51.18  # of chi-square with 24 degrees of freedom, exceeded by chance once in a thousand


@pytest.fixture(scope="module")
def forgetful():
    """A model to which all tokens are alike: whatever came before, the next one has the same distribution."""
    model = tiny_mixtral(num_hidden_layers=1, max_position_embeddings=4096).eval()
    embedding = model.model.embed_tokens.weight.data
    embedding[:] = embedding[0].clone()
    return model


@pytest.mark.slow
def test_tokens_drawn_with_drafts_have_the_models_distribution(forgetful):
    with torch.no_grad():
        top = forgetful(torch.tensor([tokens(5)])).logits[0, -1].topk(TOP)
    chances = dict(zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True))
    drafted = top.indices[1].item()
    params = SamplingParams(max_new_tokens=LENGTH, ignore_eos=True, temperature=1.0, top_k=TOP)
    with Engine(forgetful, max_batch_size=4, speculation={"gated": False, "packed": True, "most": 1}) as engine:
        use(engine, always(drafted))
        torch.manual_seed(5)
        answers = [one.token_ids for one in engine.generate([tokens(5)] * ANSWERS, params)]
        counts = engine.stats()["speculation"]["sources"]["told"]
    assert 0.8 < counts["accepted"] / counts["proposed"] / chances[drafted] < 1.2
    pairs = Counter(pair for one in answers for pair in itertools.pairwise(one))
    assert {*itertools.chain(*pairs)} == {*chances}
    num_pairs = ANSWERS * (LENGTH - 1)
    assert pairs.total() == num_pairs
    expected = {(a, b): num_pairs * chances[a] * chances[b] for a, b in itertools.product(chances, chances)}
    assert sum((pairs[pair] - number) ** 2 / number for pair, number in expected.items()) < CRITICAL
