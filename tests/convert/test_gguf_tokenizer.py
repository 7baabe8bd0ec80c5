"""Tokenizers in GGUF files: tokens, types, merges or scores, special ids, and how text is cut."""

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.gguf_families import byte_tokenizer
from moeflow.convert.gguf_tokenizer import write_tokenizer
from moeflow.errors import ConfigError, UnsupportedModelError
from moeflow.hf.gguf.tokenizer import build_tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def keys(tokenizer, vocabulary=300, pre=None):
    """What is written of a tokenizer, without `tokenizer.`."""
    writer = gguf.GGUFWriter(None, "llama")
    write_tokenizer(writer, tokenizer, vocabulary, pre)
    return {key.removeprefix("tokenizer."): value.value for key, value in writer.kv_data[0].items()}


def cut_by(*steps, ignore_merges=False):
    """A byte-level tokenizer that cuts text in these steps."""
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], ignore_merges=ignore_merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)


def test_rows_without_a_token_are_unused_and_special_tokens_control():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    found = keys(tokenizer)
    tokens, types = found["ggml.tokens"], found["ggml.token_type"]
    assert found["ggml.model"] == "gpt2"
    assert len(tokens) == len(types) == 300
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert (tokens[260], types[260]) == ("<tool>", gguf.TokenType.USER_DEFINED)
    assert (tokens[261], types[261]) == ("[PAD261]", gguf.TokenType.UNUSED)
    assert set(types[3:260]) == {gguf.TokenType.NORMAL}
    assert found["ggml.merges"] == ["h e"]
    assert [found[f"ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [1, 2, 0]


def test_tokens_beyond_the_embedding_are_left_out():
    assert len(keys(byte_tokenizer(), 200)["ggml.tokens"]) == 200


def test_whether_text_begins_and_ends_with_a_token_is_told():
    tokenizer = byte_tokenizer()
    assert (keys(tokenizer)["ggml.add_bos_token"], keys(tokenizer)["ggml.add_eos_token"]) == (False, False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert (keys(tokenizer)["ggml.add_bos_token"], keys(tokenizer)["ggml.add_eos_token"]) == (True, False)


def test_the_chat_template_is_written():
    tokenizer = byte_tokenizer()
    assert "chat_template" not in keys(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert keys(tokenizer)["chat_template"] == "{{ messages }}"
    tokenizer.chat_template = {"default": "{{ one }}", "tools": "{{ two }}"}
    found = keys(tokenizer)
    assert (found["chat_template"], found["chat_template.tools"]) == ("{{ one }}", "{{ two }}")


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((pre_tokenizers.ByteLevel(False),), "gpt-2"),
        ((pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)), "smollm"),
        (split(QWEN2), "deepseek-r1-qwen"),
        (split(LLAMA3), "dbrx"),
        (split(GPT_4O), "gpt-4o"),
    ],
)
def test_how_text_is_cut_is_named(steps, name):
    assert keys(cut_by(*steps))["ggml.pre"] == name


def test_letters_that_are_composed_make_it_qwen2():
    tokenizer = cut_by(*split(QWEN2))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert keys(tokenizer)["ggml.pre"] == "qwen2"


def test_merges_that_whole_words_pass_by_make_it_llama_3():
    assert keys(cut_by(*split(LLAMA3), ignore_merges=True))["ggml.pre"] == "llama-bpe"


def test_an_unknown_way_to_cut_text_needs_a_name():
    tokenizer = cut_by(*split(r"\d+|\D+"))
    with pytest.raises(ConfigError, match=r"Split ByteLevel.*--pre"):
        keys(tokenizer)
    assert keys(tokenizer, pre="tekken")["ggml.pre"] == "tekken"


def test_sentencepiece_tokens_get_scores_by_the_order_of_merges():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocab |= {word: 259 + at for at, word in enumerate(["▁", "h", "i", "hi", "▁hi"])}
    inner = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "hi"), ("h", "i")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    found = keys(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"))
    types, scores = found["ggml.token_type"], found["ggml.scores"]
    assert found["ggml.model"] == "llama"
    assert found["ggml.add_space_prefix"] is True
    assert types[:3] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    assert set(types[3:259]) == {gguf.TokenType.BYTE}
    assert scores[263] > scores[262] > scores[261]
    assert found["ggml.merges"] == ["▁ hi", "h i"]


def test_other_kinds_are_refused_by_name():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        keys(tokenizer)


def test_a_tokenizer_that_is_read_back_cuts_text_the_same():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    found = {f"tokenizer.{key}": value for key, value in keys(tokenizer).items()}
    again = build_tokenizer(found | {"general.architecture": "llama"})
    for text in ("he said: 12 345", "<|im_start|>user\nhé<tool>\t<|im_end|>", " 漢字 😀"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token, again.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
