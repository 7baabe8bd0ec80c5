"""Masks against brute force over every token, special tokens, ends, and forced tokens."""

import re
from random import Random

import pytest
from tokenizers import AddedToken

from helpers.small_tokenizers import byte_tokenizer, sentencepiece_tokenizer
from moeflow.engine.structure.compiling import compiled
from moeflow.engine.structure.grammars import Grammars, grammars_of
from moeflow.engine.structure.vocabulary import Vocabulary

NAMED = (
    '{"type":"object","properties":{"name":{"type":"string","maxLength":4},"ok":{"type":"boolean"}},'
    '"required":["name","ok"]}'
)


def ids(tokenizer, text):
    """Tokens of a text as it stands, without the space that SentencePiece puts before it."""
    return Grammars(Vocabulary(tokenizer, (tokenizer.eos_token_id,)))._vocabulary.tokens.tokenize_str(text)


def start(tokenizer, kind, text, **options):
    return grammars_of(tokenizer, (tokenizer.eos_token_id,)).start(kind, text, **options)


def allowed(matcher):
    return set(matcher.allowed.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("kind", "text"),
    [("json_schema", NAMED), ("regex", "(na|name|ü|a ){2,9}b?"), ("grammar", 'start: ("{" start "}")* /[0-9]+/')],
)
def test_the_mask_holds_exactly_the_tokens_that_the_grammar_takes(either, kind, text):
    vocabulary = Vocabulary(either, (either.eos_token_id,))
    base = compiled(vocabulary.tokens, kind, text)
    random = Random(3)
    for _ in range(6):
        matcher, pushed = start(either, kind, text), []
        for _ in range(25):
            if matcher.forced:
                pushed.append(matcher.forced[0])
            else:
                prefix = base.deep_copy()
                assert prefix.consume_tokens(pushed)
                taken = {token for token in range(len(either)) if prefix.validate_tokens([token]) == 1}
                assert allowed(matcher) - {either.eos_token_id} == taken - {either.eos_token_id}
                assert (either.eos_token_id in allowed(matcher)) == prefix.is_accepting()
                pushed.append(random.choice(sorted(allowed(matcher))))
                if pushed[-1] == either.eos_token_id:
                    break
            matcher.push(pushed[-1])
            if matcher.complete:
                break


def test_special_tokens_are_never_text_and_the_end_is_allowed_where_the_grammar_may_end(either):
    special = set(either.all_special_ids)
    matcher = start(either, "regex", r"(?s:.*)")
    assert allowed(matcher) & special == {either.eos_token_id}
    names = [re.escape(str(either.convert_ids_to_tokens(token))) for token in sorted(special)]
    matcher = start(either, "regex", f"({'|'.join(names)}|z)x")
    assert not allowed(matcher) & special
    for letter in str(either.convert_ids_to_tokens(max(special))):
        assert not (set(matcher.forced) or allowed(matcher)) & special
        matcher.push(ids(either, letter)[0])
    assert matcher.forced == ids(either, "x")


def test_a_grammar_may_name_a_special_token(bytewise):
    matcher = start(bytewise, "grammar", 'start: "a" <|tool|> /[bc]/')
    assert matcher.forced == [*ids(bytewise, "a"), bytewise.convert_tokens_to_ids("<|tool|>")]


def test_added_tokens_that_are_text_are_taken_as_text():
    tokenizer = byte_tokenizer(eos_token="<|end|>")
    tokenizer.add_tokens([AddedToken("banana", special=False)])
    matcher = start(tokenizer, "regex", "ba(nana|rk)")
    matcher = start(tokenizer, "regex", "(banana|kiwi)s")
    assert tokenizer.convert_tokens_to_ids("banana") in allowed(matcher)


def test_complete_is_where_nothing_may_follow(either):
    matcher = start(either, "regex", "[ab]{1,2}")
    a = ids(either, "a")[0]
    matcher.push(a)
    assert (matcher.complete, either.eos_token_id in allowed(matcher)) == (False, True)
    matcher.push(a)
    assert matcher.complete


def test_without_the_end_an_answer_goes_on_while_anything_may_follow(either):
    matcher = start(either, "regex", "[ab]{1,2}", ignore_eos=True)
    a = ids(either, "a")[0]
    matcher.push(a)
    assert (matcher.complete, either.eos_token_id in allowed(matcher)) == (False, False)
    matcher.push(a)
    assert matcher.complete


def test_an_end_token_that_has_text_ends_and_never_stands_in_the_middle():
    tokenizer = byte_tokenizer()
    a, hash_sign = ids_of(tokenizer, "a#")
    grammars = Grammars(Vocabulary(tokenizer, (hash_sign,)))
    matcher = grammars.start("regex", "(a|#)+")
    assert allowed(matcher) == {a}
    matcher.push(a)
    assert allowed(matcher) == {a, hash_sign}
    with pytest.raises(RuntimeError, match="no token of the model's"):
        grammars.start("regex", "[ab]#").push(a)


def test_a_model_without_an_end_is_bound_as_well():
    tokenizer = byte_tokenizer()
    matcher = Grammars(Vocabulary(tokenizer, ())).start("regex", "a?b?")
    assert allowed(matcher) == set(ids_of(tokenizer, "ab"))
    matcher.push(ids_of(tokenizer, "b")[0])
    assert matcher.complete


def test_forced_tokens_are_those_that_the_tokenizer_writes(sentencepiece):
    matcher = start(sentencepiece, "regex", r'\{"name": "[a-z]{1,9}"\}')
    pieces = sentencepiece.convert_ids_to_tokens(matcher.forced)
    assert pieces[:3] == ['{"', "name", '":']
    assert sentencepiece.decode(matcher.forced).startswith('{"name":')


def test_a_token_that_the_grammar_does_not_allow_is_an_error(either):
    matcher = start(either, "regex", "[ab]c")
    with pytest.raises(RuntimeError, match="grammar does not go on"):
        matcher.push(ids(either, "z")[0])


def ids_of(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_sentencepiece_s_byte_tokens_write_letters_that_are_no_token():
    tokenizer = sentencepiece_tokenizer()
    matcher = start(tokenizer, "regex", "é")
    assert tokenizer.convert_ids_to_tokens(matcher.forced) == ["<0xC3>", "<0xA9>"]
