"""Text from tokens: whole characters, stop strings across tokens, and a cost that does not grow with the text."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from helpers.small_tokenizers import byte_tokenizer
from moeflow.engine.text.detokenizer import Detokenizer
from moeflow.engine.text.stop_strings import StopStrings

TEXT = st.text(alphabet="ab \n<é€漢😀", max_size=30)
STOPS = st.lists(st.text(alphabet="ab \n<é😀", min_size=1, max_size=4), max_size=3).map(tuple)
END = "<|end|>"


def byte_fallback_tokenizer():
    """Words with a mark for the space before them and bytes for the rest, as Llama's kind."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "<"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a")]
    words = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


TOKENIZERS = {"byte level": byte_tokenizer(eos_token=END), "byte fallback": byte_fallback_tokenizer()}
BYTES = TOKENIZERS["byte level"]


def in_pieces(tokenizer, token_ids, stop=()):
    """Return the pieces of text and the stop string that ended them, or None."""
    strings = StopStrings(tokenizer, stop)
    pieces = []
    for token_id in token_ids:
        piece, stopped = strings.push(token_id)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, strings.finish()], strings.found


def cut(text, stop):
    """Return the text before the stop string that is complete first, and that string."""
    for end in range(1, len(text) + 1):
        ending = [each for each in stop if text[:end].endswith(each)]
        if ending:
            found = max(ending, key=len)
            return text[: end - len(found)], found
    return text, None


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, stop=STOPS)
@settings(max_examples=150, deadline=None)
def test_the_pieces_are_the_text_before_the_stop_string_that_is_complete_first(name, text, stop):
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer(text)["input_ids"]
    pieces, found = in_pieces(tokenizer, token_ids, stop)
    assert ("".join(pieces), found) == cut(tokenizer.decode(token_ids), stop)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 256), max_size=120))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_what_decoding_them_at_once_gives(token_ids):
    assert "".join(in_pieces(BYTES, token_ids)[0]) == BYTES.decode(token_ids, skip_special_tokens=True)


@pytest.mark.slow
@given(st.binary(min_size=15, max_size=60), st.text(alphabet="é€漢😀a", max_size=4))
@settings(max_examples=150, deadline=None)
def test_characters_behind_many_bytes_that_are_no_text_come_out_whole(junk, text):
    token_ids = [BYTES.convert_tokens_to_ids(char) for char in bytes_as_tokens(b"\xff" * 20 + junk + text.encode())]
    assert "".join(in_pieces(BYTES, token_ids)[0]) == BYTES.decode(token_ids)


def bytes_as_tokens(data):
    """Return the characters that GPT-2's kind of tokenizer writes for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    names = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [names[byte] for byte in data]


def test_text_is_shown_as_soon_as_it_can_be_no_stop_string():
    strings = StopStrings(BYTES, ("END",))
    shown = [strings.push(token_id) for token_id in BYTES("aEN ENDb")["input_ids"]]
    assert [text for text, _ in shown] == ["a", "", "", "EN ", "", "", "", ""]
    assert [stopped for _, stopped in shown] == [False] * 6 + [True, True]
    assert strings.finish() == ""


def test_held_text_comes_out_at_the_end():
    assert in_pieces(BYTES, BYTES("abEN")["input_ids"], ("END",)) == (["a", "b", "", "", "EN"], None)


def test_a_stop_string_in_half_a_character_at_the_end_is_found():
    token_ids = BYTES("ab€")["input_ids"][:-1]
    assert in_pieces(BYTES, token_ids, ("\ufffd",))[1]


def test_special_tokens_have_no_text_and_stand_between_the_characters_of_a_stop_string():
    token_ids = [*BYTES("aE")["input_ids"], BYTES.eos_token_id, *BYTES("ND")["input_ids"]]
    pieces, found = in_pieces(BYTES, token_ids, ("END",))
    assert ("".join(pieces), found) == ("aEND", None)


@pytest.mark.parametrize(
    ("stop", "text"),
    [(END, "ab"), ("b" + END, "a"), (END + "c", "ab"), ("b" + END + "c", "a"), (END + END, "abcd"), ("d" + END, "abc")],
)
def test_stop_strings_are_found_in_special_tokens_as_they_are_written(stop, text):
    token_ids = BYTES(f"ab{END}cd{END}{END}e")["input_ids"]
    pieces, found = in_pieces(BYTES, token_ids, (stop, "never" + END))
    assert ("".join(pieces), found) == (text, stop)


def test_text_before_a_special_token_is_shown_though_the_token_may_begin_a_stop_string():
    strings = StopStrings(BYTES, (END + "b",))
    assert [strings.push(token_id) for token_id in BYTES(f"a<{END}ac")["input_ids"]] == [
        ("a", False), ("", False), ("<", False), ("a", False), ("c", False),
    ]  # fmt: skip


def test_the_token_that_ends_an_answer_may_complete_a_stop_string():
    strings = StopStrings(BYTES, ("b" + END,))
    shown = [strings.push(token_id) for token_id in BYTES("ab")["input_ids"]]
    assert shown == [("a", False), ("", False)]
    assert strings.push(BYTES.eos_token_id, visible=False) == ("", True)


def test_a_stop_string_may_begin_in_the_prompt_and_not_end_there():
    for prompt, answer, stop, text in (
        ("a\n", "\nb", "\n\n", ""), ("END", "ND", "END", "ND"), ("x€", "€b", "€€", ""), (END, "ab", END + "a", ""),
    ):  # fmt: skip
        strings = StopStrings(BYTES, (stop,), BYTES(prompt)["input_ids"])
        pieces = [strings.push(token_id)[0] for token_id in BYTES(answer)["input_ids"]]
        assert "".join([*pieces, strings.finish()]) == text


def merged_tokenizer():
    """Bytes merged into words, and special tokens between them, as most chat models have it."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    words.train_from_iterator(["the quick fox\nsaid stop. é 漢 😀 END\n\nstop END"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=SPECIAL)


SPECIAL = ["<|im_start|>", "<|im_end|>", "<tool call>"]
MERGED = merged_tokenizer()
IDS = st.one_of(
    st.sampled_from(MERGED.convert_tokens_to_ids(SPECIAL)), st.integers(len(MERGED) - 60, len(MERGED) - 1)
)  # the last are merged ones, some with half a character at an end


@pytest.mark.slow
@given(st.data(), st.lists(IDS, min_size=1, max_size=8), st.lists(IDS, min_size=1, max_size=12))
@settings(max_examples=400, deadline=None)
def test_random_stop_strings_end_an_answer_at_the_token_where_those_of_generate_do(data, prompt, answer):
    written = MERGED.decode(prompt + answer).replace("\ufffd", "")
    begins = st.tuples(st.integers(0, max(0, len(written) - 1)), st.sampled_from([1, 2, 3, 5, 12, 20]))
    cuts = data.draw(st.lists(begins, min_size=1, max_size=3))
    stop = [part for begin, size in cuts if (part := written[begin : begin + size])]
    assume(stop)
    criteria = StopStringCriteria(MERGED, stop)
    ends = [end for end in range(1, len(answer) + 1) if criteria(torch.tensor([prompt + answer[:end]]), None)[0]]
    strings = StopStrings(MERGED, tuple(stop), prompt)
    pieces, end = [], None
    for place, token_id in enumerate(answer, 1):
        piece, stopped = strings.push(token_id)
        pieces.append(piece)
        if stopped:
            end = place
            break
    assert end == (ends[0] if ends else None)
    text = MERGED.decode(answer[:end], skip_special_tokens=True)
    if "\ufffd" not in text:
        assert text.startswith("".join(pieces))
    if end is None:
        assert "".join([*pieces, strings.finish()]) == text or "\ufffd" in text


def test_in_a_token_of_several_characters_too_the_stop_string_complete_first_ends_the_text():
    words = Tokenizer(models.WordLevel({"abcd": 0, "?": 1, "abab": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    assert in_pieces(tokenizer, [0], ("abcd", "bc", "c"))[0] == ["a", ""]
    assert in_pieces(tokenizer, [2], ("b",))[0] == ["a", ""]


@pytest.mark.parametrize("num_junk", range(10, 40))
def test_a_character_anywhere_behind_bytes_that_are_no_text_comes_out_whole(num_junk):
    token_ids = [BYTES.convert_tokens_to_ids(char) for char in bytes_as_tokens(b"\xff" * num_junk + "😀".encode())]
    assert "".join(in_pieces(BYTES, token_ids)[0]) == "\ufffd" * num_junk + "😀"


def test_tokens_that_all_end_inside_a_character_lose_none():
    first, second, last = bytes_as_tokens("€".encode())
    words = Tokenizer(models.BPE({first: 0, second: 1, last: 2, last + first: 3}, []))
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert "".join(in_pieces(tokenizer, [0, *[1, 3] * 29, 1, 2])[0]) == "€" * 30


class CountsTokens:
    """A tokenizer that remembers how many tokens it was given to decode."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.most = 0

    def decode(self, token_ids, **options):
        self.most = max(self.most, len(token_ids))
        return self.tokenizer.decode(token_ids, **options)


@pytest.mark.parametrize("text", ["plain words ", "漢😀", "\ufffd"])
def test_a_token_costs_the_same_in_a_long_text(text):
    counts = CountsTokens(BYTES)
    token_ids = BYTES(text * 300)["input_ids"]
    assert "".join(in_pieces(counts, token_ids, ("END",))[0]) == text * 300
    assert counts.most < 50


@pytest.mark.parametrize("token_id", [BYTES.eos_token_id, BYTES.convert_tokens_to_ids("ÿ")])
def test_tokens_without_text_cost_the_same_in_a_long_row(token_id):
    counts = CountsTokens(BYTES)
    detokenizer = Detokenizer(counts)
    pieces = [detokenizer.push([token_id]) for _ in range(500)]
    assert "".join([*pieces, detokenizer.finish()]) == BYTES.decode([token_id] * 500, skip_special_tokens=True)
    assert counts.most < 50
