"""A draft model with another tokenizer: answers are those without it, and it is accepted where it says the same."""

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from helpers.cyclic_models import cyclic, piece_tokenizer
from helpers.engine_requests import assert_empty, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_models import tiny_mixtral
from helpers.small_tokenizers import byte_tokenizer, letter_tokenizer, sentencepiece_tokenizer
from moeflow import Engine, SamplingParams, load_moe
from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.through_text import ThroughText, draft_source
from moeflow.errors import ConfigError, UnsupportedModelError
from moeflow.kernels.cpu.library import instruction_set

CYCLE = "abcdefghijé lmnopqrstuvwxyz€"
PIECES = ["abc", "def", "ghi", "é l", "mno", "pq", "rst", "uvw", "xyz€"]


def other_way_round(tokenizer):
    """The same pieces with other numbers."""
    vocab, data = tokenizer.get_vocab(), json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["vocab"] = {piece: len(vocab) - 1 - number for piece, number in vocab.items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))


@pytest.fixture(scope="module")
def lettered():
    """A random model whose tokens are letters, its tokenizer, and both with tokens in the other order."""
    tokenizer = letter_tokenizer()
    model, turned = (tiny_mixtral(vocab_size=len(tokenizer)) for _ in range(2))
    with torch.no_grad():
        for part in (turned.get_input_embeddings(), turned.lm_head):
            part.weight.copy_(part.weight.flip(0))
    return model, tokenizer, turned, other_way_round(tokenizer)


def answered(model, tokenizer, prompts, params, **speculation):
    option = {"sources": (), "gated": False, "packed": True, **speculation} if speculation else None
    with Engine(model, tokenizer, speculation=option) as engine:
        found = engine.generate(prompts, params)
        assert_empty(engine)
        stats = engine.stats()["speculation"]
    return [(one.token_ids, one.text, one.finish_reason, one.error) for one in found], stats


def compare(model, tokenizer, prompts, params, **speculation):
    """Check that answers are those without drafts; return what became of the drafted tokens."""
    expected, _ = answered(model, tokenizer, prompts, params)
    found, stats = answered(model, tokenizer, prompts, params, **speculation)
    assert found == expected
    counts = stats["sources"]["draft_model"]
    assert counts["reason"] is None
    return counts


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_model_with_its_tokens_in_another_order_is_accepted(lettered, temperature):
    model, tokenizer, draft, draft_tokenizer = lettered
    params = SamplingParams(max_new_tokens=14, ignore_eos=True, temperature=temperature, seed=5)
    prompts = ["once upon a time", tokens(9, 3, below=90)]
    counts = compare(model, tokenizer, prompts, params, draft_model=draft, draft_tokenizer=draft_tokenizer, most=4)
    assert counts["accepted"] > (0 if temperature else 0.9 * counts["proposed"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "sentencepiece"])
def test_drafts_in_other_pieces_are_accepted(kind, temperature):
    """What the model says in pieces, the draft says in bytes; what it says in bytes, in pieces."""
    own, other = piece_tokenizer(PIECES), byte_tokenizer()
    if kind == "pieces":
        own, other = other, piece_tokenizer(PIECES[1:])
    elif kind == "sentencepiece":
        other = sentencepiece_tokenizer()
    model, draft = cyclic(own, CYCLE), cyclic(other, CYCLE)
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=temperature, seed=3)
    prompts = [CYCLE[:9], f"o{CYCLE[3:20]}"]
    counts = compare(model, own, prompts, params, draft_model=draft, draft_tokenizer=other, most=4)
    assert counts["accepted"] > 10
    if not temperature and kind != "pieces":  # the half of a piece says nothing to a model of pieces
        assert counts["accepted"] > 0.9 * counts["proposed"]


@pytest.mark.slow
@pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
def test_native_steps_at_half_of_the_experts_verify_them(tmp_path):
    own, other = piece_tokenizer(PIECES), byte_tokenizer()
    cyclic(own, CYCLE).save_pretrained(tmp_path)
    model = load_moe(tmp_path, expert_memory="50%", predictor=None, step="auto", device="cpu")
    with model.moeflow:
        params = SamplingParams(max_new_tokens=24, ignore_eos=True)
        option = {"packed": False, "draft_model": cyclic(other, CYCLE), "draft_tokenizer": other}
        counts = compare(model, own, ["abc", "uvwxyz€abcd"], params, **option)
    assert counts["accepted"] > 10


def source(own, other, **options):
    return ThroughText(cyclic(other, CYCLE, **options), other, own)


def test_a_token_that_the_text_behind_it_changes_is_not_proposed():
    own, other = piece_tokenizer(["abc", "abcdef", "ghijé"]), byte_tokenizer()
    made, one = source(own, other), Sequence("one", own("xyz€abc")["input_ids"], 99)
    assert made.propose(one, 3).tokens == ()  # "abc" would be "abcdef"
    one = Sequence("two", own("xyz€abcdef")["input_ids"], 99)
    found = [own.decode(list(made.propose(one, most).tokens)) for most in range(1, 5)]
    assert found == ["", "", "ghijé", "ghijé "]  # from 3, 5, 7 and 8 bytes


def test_probabilities_are_those_of_the_drafts_tokens_that_begin_in_a_token():
    own, other = piece_tokenizer(PIECES), byte_tokenizer()
    made = source(own, other)
    says = made._model.says("else", other("xyz€abc")["input_ids"], 4).probabilities
    found = made.propose(Sequence("one", own("xyz€abc")["input_ids"], 99), 3)
    assert found.tokens[:1] == tuple(own("def")["input_ids"])
    assert found.probabilities[0] == pytest.approx(says[0] * says[1] * says[2], rel=1e-4)


def test_a_draft_model_whose_context_is_full_proposes_nothing_more():
    own, other = piece_tokenizer(PIECES), byte_tokenizer()
    model, draft = cyclic(own, CYCLE), cyclic(other, CYCLE, max_position_embeddings=48)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    counts = compare(model, own, ["abc"], params, draft_model=draft, draft_tokenizer=other)
    assert 0 < counts["accepted"] < 48


def test_a_draft_ends_before_a_special_token():
    own, other = letter_tokenizer(), byte_tokenizer(additional_special_tokens=["Q"], bos_token="<b>", eos_token="<e>")
    made, one = ThroughText(cyclic(other, "uvwxyzQ"), other, own), Sequence("one", own("uv")["input_ids"], 99)
    assert own.decode(list(made.propose(one, 9).tokens)) == "wxyz"


def test_what_is_known_of_a_sequence_goes_with_it():
    own, other = piece_tokenizer(PIECES), byte_tokenizer()
    made = source(own, other)
    made.propose(Sequence("one", own("abc")["input_ids"], 99), 3)
    assert made._texts
    made.forget("one")
    assert not made._texts
    assert not made._model._caches


def test_probabilities_that_are_no_numbers_end_it_with_one_warning(caplog):
    own, other = piece_tokenizer(PIECES), byte_tokenizer(eos_token="!")
    model, draft = cyclic(own, CYCLE), cyclic(other, CYCLE)
    with torch.no_grad():
        draft.lm_head.weight.fill_(torch.nan)
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    expected, _ = answered(model, own, ["abc"], params)
    with caplog.at_level(logging.WARNING):
        found, stats = answered(model, own, ["abc"], params, draft_model=draft, draft_tokenizer=other)
    assert found == expected
    assert len(caplog.records) == 1
    assert "no numbers" in stats["sources"]["draft_model"]["reason"]


class TestRefusals:
    def test_another_vocabulary_without_its_tokenizer_is_refused_by_name(self):
        with pytest.raises(
            ConfigError, match=r"MixtralForCausalLM has other tokens: it has 128 .*Give draft_tokenizer="
        ):
            draft_source(tiny_mixtral(), 500)

    def test_another_vocabulary_in_an_engine_without_a_tokenizer_is_refused(self, lettered):
        model, _, _, _ = lettered
        option = {"draft_model": tiny_mixtral(), "draft_tokenizer": byte_tokenizer(), "packed": True}
        with pytest.raises(ConfigError, match="Give the model's tokenizer to the engine"):
            Engine(model, speculation=option)

    def test_a_tokenizer_with_more_tokens_than_its_model_is_refused(self, lettered):
        model, tokenizer, draft, _ = lettered
        option = {"draft_model": draft, "draft_tokenizer": byte_tokenizer(), "packed": True}
        with pytest.raises(ConfigError, match=r"draft_tokenizer has 256 tokens.*knows 95"):
            Engine(model, tokenizer, speculation=option)

    def test_what_is_no_model_is_refused(self):
        with pytest.raises(ConfigError, match="draft_model='some/name' is no model"):
            draft_source("some/name", 128)

    def test_a_draft_model_that_keeps_state_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="other state than keys and values"):
            draft_source(build_model(FAMILIES["jamba"]), 128)
