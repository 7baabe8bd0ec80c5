"""Text from tokens: whole characters, stop strings across tokens, and a cost that does not grow with the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.small_tokenizers import byte_tokenizer
from moeflow.engine.detokenizer import Detokenizer
from moeflow.engine.stop_strings import StopStrings

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
    """Return the pieces of text and whether a stop string ended them."""
    strings = StopStrings(tokenizer, stop)
    pieces = []
    for token_id in token_ids:
        piece, stopped = strings.push(token_id)
        pieces.append(piece)
        if stopped:
            break
    return [*pieces, strings.finish()], strings.stopped


def cut(text, stop):
    """Return the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        ending = [each for each in stop if text[:end].endswith(each)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXT, stop=STOPS)
@settings(max_examples=150, deadline=None)
def test_the_pieces_are_the_text_before_the_stop_string_that_is_complete_first(name, text, stop):
    tokenizer = TOKENIZERS[name]
    token_ids = tokenizer(text)["input_ids"]
    pieces, stopped = in_pieces(tokenizer, token_ids, stop)
    assert ("".join(pieces), stopped) == cut(tokenizer.decode(token_ids), stop)
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
    assert in_pieces(BYTES, BYTES("abEN")["input_ids"], ("END",)) == (["a", "b", "", "", "EN"], False)


def test_a_stop_string_in_half_a_character_at_the_end_is_found():
    token_ids = BYTES("ab€")["input_ids"][:-1]
    assert in_pieces(BYTES, token_ids, ("\ufffd",))[1]


def test_special_tokens_have_no_text_and_break_no_stop_string():
    token_ids = [*BYTES("aE")["input_ids"], BYTES.eos_token_id, *BYTES("ND")["input_ids"]]
    pieces, stopped = in_pieces(BYTES, token_ids, ("END",))
    assert ("".join(pieces), stopped) == ("a", True)


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
