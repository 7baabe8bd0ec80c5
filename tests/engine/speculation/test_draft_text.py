"""A sequence's text in the tokens of another tokenizer: those of the whole text, for the work on its end."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.cyclic_models import piece_tokenizer, trained_tokenizer
from helpers.small_tokenizers import byte_tokenizer, letter_tokenizer, sentencepiece_tokenizer
from moeflow.engine.sequence import Sequence
from moeflow.engine.speculation.draft_text import DraftText

WORDS = ["tea", "an", "name", "é", "naïve", "42", "1234567", "don't", "(x)", "{", "\n\n", "  two", "木", "🙂", "ma-na"]


def text_of(num_words, seed=0):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(num_words))


class Counted(PreTrainedTokenizerFast):
    """Counts the letters that it encodes."""

    letters = 0

    def __call__(self, text, **options):
        self.letters += len(text)
        return super().__call__(text, **options)


def counted(tokenizer):
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return Counted(tokenizer_object=tokenizer.backend_tokenizer, **names)


def grown(own, ids):
    """A sequence that gets tokens in pieces of changing length."""
    one, draw = Sequence("one", ids[:5], len(ids)), random.Random(1)
    yield one
    while one.length < len(ids):
        for token in ids[one.length :][: draw.randrange(1, 9)]:
            one.append(token)
        yield one


def draft_tokenizers():
    return {
        "bytes": byte_tokenizer(),
        "trained": trained_tokenizer(text_of(200), 330),
        "sentencepiece": sentencepiece_tokenizer(),
        "letters": letter_tokenizer(),
    }


@pytest.mark.parametrize("name", list(draft_tokenizers()))
def test_the_tokens_are_those_of_the_whole_text_for_the_work_on_its_end(name):
    own, draft = trained_tokenizer(text_of(200, seed=2), 400), counted(draft_tokenizers()[name])
    ids = own(text_of(600))["input_ids"]
    text, num_steps = DraftText(own, draft), 0
    for one in grown(own, ids):
        before = draft.letters
        found = text.read(one)
        assert draft.letters - before < 1500
        whole = own.decode(one.tokens_from(0)).rstrip("\ufffd")
        assert found == super(Counted, draft).__call__(whole, add_special_tokens=False)["input_ids"]
        num_steps += 1
    assert num_steps > 50


def test_a_text_without_spaces_is_encoded_as_a_whole():
    own, draft = byte_tokenizer(), trained_tokenizer("na" * 9, 260)
    ids = own("naanna" * 300)["input_ids"]
    text = DraftText(own, draft)
    for one in grown(own, ids):
        assert text.read(one) == draft(own.decode(one.tokens_from(0)))["input_ids"]


def test_the_first_and_the_last_special_token_are_the_drafts_and_others_are_written():
    own = byte_tokenizer(bos_token="<begin>", eos_token="<end>", additional_special_tokens=["<user>", "<tool>"])
    draft = trained_tokenizer("text", 270, bos_token="[B]", eos_token="[E]", additional_special_tokens=["<tool>"])
    one = Sequence("one", own("<begin>one<end>two<user>three<tool>four")["input_ids"], 9)
    assert len(one.prompt_ids) < 25
    expected = draft("[B]one[E]two<user>three<tool>four")["input_ids"]
    assert DraftText(own, draft).read(one) == expected


def test_a_begin_that_the_draft_puts_before_its_texts_stands_there_once():
    own, draft = byte_tokenizer(bos_token="<begin>"), sentencepiece_tokenizer()
    draft.add_bos_token = True
    if draft("a")["input_ids"][0] != draft.bos_token_id:
        draft.backend_tokenizer.post_processor = None
        from tokenizers.processors import TemplateProcessing

        draft.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    for begin in ("<begin>", ""):
        one = Sequence("one", own(begin + "a name")["input_ids"], 9)
        assert DraftText(own, draft).read(one) == draft("a name")["input_ids"]


class TestBack:
    own = piece_tokenizer([" bee", "un", "believ", "able", "123"])

    def back(self, before, text, ids=None):
        """Tokens, as text, of a text behind another one."""
        reading = DraftText(self.own, letter_tokenizer())
        reading.read(Sequence("one", ids or self.own(before)["input_ids"], 9))
        tokens = reading.tokens_of(text)
        assert reading.ends_of(tokens) == [len(self.own.decode(tokens[: n + 1])) for n in range(len(tokens))]
        return self.own.convert_ids_to_tokens(tokens)

    def test_they_go_on_with_the_last_word(self):
        assert self.back("x un", "believable") == ["believ", "able"]

    @pytest.mark.parametrize(("before", "text"), [("x be", "e"), ("12", "3 be"), ("x  b", "ee")])
    def test_there_are_none_where_the_last_words_tokens_would_be_others(self, before, text):
        assert self.back(before, text) == []

    def test_a_word_that_was_cut_in_another_way_ends_with_the_word(self):
        cut = self.own("x ")["input_ids"] + [token for letter in "un" for token in self.own(letter)["input_ids"]]
        assert self.back("", "able", cut) == []
        assert self.back("", "able", cut + self.own(" be")["input_ids"]) == ["able"]

    def test_half_a_character_is_completed(self):
        half = self.own("x 木")["input_ids"][:-1]
        reading = DraftText(self.own, byte_tokenizer())
        assert reading.read(Sequence("one", half, 9)) == byte_tokenizer()("x ")["input_ids"]
        assert reading.tokens_of("木un") == self.own("木un")["input_ids"][2:]
        assert reading.tokens_of("éun") == []


def test_tokens_of_sentencepieces_kind_go_on_within_a_text():
    own = sentencepiece_tokenizer()
    reading = DraftText(own, byte_tokenizer())
    one = Sequence("one", own("me a na")["input_ids"], 9)
    assert reading.read(one) == byte_tokenizer()("me a na")["input_ids"]
    assert reading.tokens_of(" name") == own.convert_tokens_to_ids(["\u2581", "name"])
