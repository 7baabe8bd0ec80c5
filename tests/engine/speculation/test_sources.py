"""What sources propose: from a sequence's own text, from what the model said lately, and from another model."""

import pytest
import torch

from helpers.engine_requests import generated, tokens
from helpers.small_models import tiny_mixtral
from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.draft_model import DraftModel
from moeflow.engine.speculation.drafts import NO_DRAFT
from moeflow.engine.speculation.prompt_lookup import PromptLookup
from moeflow.engine.speculation.token_recycling import TokenRecycling


def sequence(prompt, answer=(), id="one"):
    return Sequence(id, list(prompt), 100, token_ids=list(answer))


class TestPromptLookup:
    def test_what_followed_the_longest_match_is_proposed(self):
        prompt = [5, 1, 2, 3, 4, 9, 9, 1, 2, 3]
        assert PromptLookup().propose(sequence(prompt), 3).tokens == (4, 9, 9)

    def test_a_match_that_reaches_the_end_goes_round(self):
        assert PromptLookup().propose(sequence([1, 2, 3, 1, 2, 3]), 8).tokens == (1, 2, 3, 1, 2, 3, 1, 2)

    def test_nothing_is_proposed_where_nothing_was_said_before(self):
        assert PromptLookup().propose(sequence([1, 2, 3, 4]), 3) == NO_DRAFT

    def test_a_sequence_that_goes_on_has_what_a_new_one_would_have(self):
        answer, source = tokens(80, 1, below=6), PromptLookup()
        going_on = sequence([1, 2])
        for token in answer:
            going_on.append(token)
            assert source.propose(going_on, 4) == PromptLookup().propose(sequence([1, 2], going_on.token_ids), 4)

    def test_a_longer_match_promises_more(self):
        short = PromptLookup().propose(sequence([1, 2, 7, 1, 2]), 1)
        long = PromptLookup().propose(sequence([1, 2, 3, 4, 5, 7, 1, 2, 3, 4, 5]), 1)
        assert long.probabilities > short.probabilities

    def test_a_text_that_is_forgotten_begins_anew(self):
        source = PromptLookup()
        source.propose(sequence([1, 2, 7, 1, 2]), 1)
        source.forget("one")
        assert source.propose(sequence([1, 2]), 1) == NO_DRAFT


class TestTokenRecycling:
    def test_likeliest_successors_make_a_chain(self):
        source, logits = TokenRecycling(), torch.zeros(3, 10)
        logits[0, 4], logits[1, 7], logits[2, 3] = 5.0, 9.0, 9.0
        source.saw([3, 4, 7], logits)
        draft = source.propose(sequence([1, 3]), 5)
        assert draft.tokens == (4, 7, 3, 4, 7)
        assert draft.probabilities[0] == pytest.approx(float(logits[0].softmax(0)[4]))

    def test_the_latest_is_kept_and_nan_teaches_nothing(self):
        source = TokenRecycling()
        source.saw([3], torch.eye(10)[:1] * 8)
        source.saw([3], torch.eye(10)[2:3] * 8)
        source.saw([3], torch.full((1, 10), torch.nan))
        assert source.propose(sequence([3]), 1).tokens == (2,)
        assert source.propose(sequence([9]), 1) == NO_DRAFT


class TestDraftModel:
    @pytest.fixture(scope="class")
    def model(self):
        return tiny_mixtral().eval()

    def test_it_proposes_what_the_model_says(self, model):
        prompt = tokens(9, 3)
        answer = generated(model, prompt, 12)
        source, one = DraftModel(model, 128), sequence(prompt)
        assert source.propose(one, 5).tokens == tuple(answer[:5])
        for token in answer[:3]:
            one.append(token)
        assert source.propose(one, 5).tokens == tuple(answer[3:8])  # goes on with what its cache has
        one.append(answer[3] + 1)
        assert source.propose(one, 4).tokens == tuple(generated(model, prompt + one.token_ids, 4))
