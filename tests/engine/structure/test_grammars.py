"""Compiled grammars: one for each tokenizer and text, shared, limited in number; tokenizers that cannot be read."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import BertTokenizerLegacy

from helpers.small_tokenizers import byte_tokenizer, letter_tokenizer
from moeflow.engine.structure import grammars as grammars_module
from moeflow.engine.structure.grammars import Grammars, grammars_of
from moeflow.engine.structure.vocabulary import Vocabulary
from moeflow.errors import ConfigError


def test_a_text_is_compiled_once_and_matchers_of_it_go_their_own_ways(bytewise):
    grammars = Grammars(Vocabulary(bytewise, (256,)))
    one, other = grammars.start("regex", "[ab]c"), grammars.start("regex", "[ab]c")
    a, b = bytewise("ab")["input_ids"]
    one.push(a)
    assert one.forced == bytewise("c")["input_ids"]
    assert not other.forced
    other.push(b)
    assert grammars.num_compiled == 1
    grammars.start("grammar", 'start: "[ab]c"')
    assert grammars.num_compiled == 2


def test_the_number_of_kept_grammars_is_limited_and_the_least_used_goes(bytewise, monkeypatch):
    monkeypatch.setattr(grammars_module, "MOST_KEPT", 3)
    grammars = Grammars(Vocabulary(bytewise, (256,)))
    for text in ("a", "b", "c", "a", "d", "a", "c"):
        grammars.start("regex", text)
        assert len(grammars) <= 3
    assert grammars.num_compiled == 4
    grammars.start("regex", "b")
    assert grammars.num_compiled == 5


def test_threads_share_one_tokenizer_s_grammars(bytewise):
    def forced(number):
        return grammars_of(bytewise, (256,)).start("regex", f"x{number % 3}y").forced

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(forced, range(24)))
    assert found == [bytewise(f"x{number % 3}y")["input_ids"] for number in range(24)]
    assert grammars_of(bytewise, (256,)) is grammars_of(bytewise, (256,))
    assert grammars_of(bytewise, (256,)) is not grammars_of(bytewise, (257,))


def test_a_tokenizer_that_got_tokens_is_read_anew_and_one_that_is_gone_is_forgotten():
    tokenizer = byte_tokenizer(eos_token="<|end|>")
    before = grammars_of(tokenizer, (256,))
    tokenizer.add_tokens(["banana"])
    after = grammars_of(tokenizer, (256,))
    assert after is not before
    assert bool(after.start("regex", "banana|kiwi").allowed[257])
    kept = weakref.ref(after)
    del tokenizer, before, after
    gc.collect()
    assert kept() is None


def test_tokenizers_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n")
    with pytest.raises(ConfigError, match=r"tokenizers library, this is a BertTokenizerLegacy: leave json_schema"):
        grammars_of(BertTokenizerLegacy(str(tmp_path / "vocab.txt")), (2,))
    with pytest.raises(ConfigError, match=r"cannot read this model's tokenizer, a .*decoder.*Leave json_schema"):
        grammars_of(letter_tokenizer(), (2,))


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [("regex", r"[^\s\S]", "no answer"), ("regex", "()", "the empty answer"), ("grammar", "start: start", "no answer")],
)
def test_a_grammar_without_answers_is_refused(bytewise, kind, text, told):
    grammars = Grammars(Vocabulary(bytewise, (256,)))
    with pytest.raises(ConfigError, match=f"^{kind} allows {told}"):
        grammars.start(kind, text)
    assert len(grammars) == 0
