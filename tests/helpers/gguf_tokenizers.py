"""GGUF metadata of a tokenizer, written as llama.cpp's converter writes it, and texts on which tokenizers differ."""

import json
import random

import gguf

KINDS = gguf.TokenType


def tokens_of(tokenizer, size=None):
    """The tokens and kinds of a tokenizer of the library tokenizers, and names for ids that have no token."""
    fields = json.loads(tokenizer.to_str())
    words = dict(map(reversed, fields["model"]["vocab"].items()))
    added = {entry["id"]: entry for entry in fields["added_tokens"]}
    words.update({number: entry["content"] for number, entry in added.items()})
    tokens, kinds = [], []
    for number in range(max(words) + 1 if size is None else size):
        word = words.get(number, f"[PAD{number}]")
        kind = KINDS.NORMAL if number in words else KINDS.UNUSED
        if number in added:
            looks_special = added[number]["special"] or (word.startswith("<|") and word.endswith("|>"))
            kind = KINDS.CONTROL if looks_special else KINDS.USER_DEFINED
            word = word if looks_special else word.replace("\u2581", " ")
        elif fields["model"].get("byte_fallback") and word.startswith("<0x"):
            kind = KINDS.BYTE
        tokens.append(word)
        kinds.append(int(kind))
    return tokens, kinds


def tokenizer_metadata(tokenizer, pre, *, model="gpt2", size=None, special=None, **more):
    """The metadata of a byte-level tokenizer: a dict of `tokenizer.*`.

    Args:
        tokenizer: of the library tokenizers.
        pre: how llama.cpp names its split.
        model: how it names its kind.
        size: rows of the embeddings; those without a token are filled up.
        special: {"bos": id, ...}.
        more: further keys of `tokenizer.ggml`.
    """
    tokens, kinds = tokens_of(tokenizer, size)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in (special or {}).items()},
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


_PARTS = (
    "Hello", "world", " the", "don't", "I'LL", "we've", "HTTPServer", "camelCase", "naïve", "e\u0301te\u0301",
    "straße", "Ünïcödé", "日本語", "中文字符", "한국어", "ไทย", "हिन\u094dदी", "עברית", "العربية", "Ελληνικά",
    "кириллица", "😀", "👩\u200d👩\u200d👧", "🇨🇭", "½", "²", "Ⅷ", "１２３", "0", "7", "42", "123", "1234",
    "1234567", "3.14159", "1,000,000", "0x1F", "٣٤٥", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\n   ",
    " \n", "\u00a0", "\u3000", "\u200b", "\u0000", "!", "...", "?!", "—", "“q”", "「」", "==", "!=", "->", "/*",
    "*/", "//", "#", "{", "}", "def f(x):", "return x", "</div>", "<a href=''>", "a_b", "$x", "@user", "\\n",
    "\"", "'", "''", "`", "~", "|", "^", "_", "'s", "'S", " 'd", "ſ", "İ", "ǅ", "ʼn", "\u0301", "🧑\u200d🚀",
    "ﬁ", "\ufeff",
)  # fmt: skip


def varied_texts(count=300, special=(), seed=1):
    """Texts of words, code, digits, spaces, signs of many scripts, and special tokens; the same for the same seed."""
    drawn = random.Random(seed)
    parts = [*_PARTS, *special, *special]
    texts = ["", " ", "a", " a", "a ", "  a  b  ", *special]
    while len(texts) < count:
        glue = drawn.choice(["", " ", "  ", "\n"])
        texts.append(glue.join(drawn.choice(parts) for _ in range(drawn.randint(1, 14))))
    return texts[:count]


def write_gguf(path, metadata, tensors=None, architecture="qwen3moe", types=None):
    """Write a GGUF file; ints are stored as 32 bits, and `types` names GGML's types of tensors that are blocks."""
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            add[type(value)](key, value)
    for name, values in (tensors or {}).items():
        blocks = gguf.GGMLQuantizationType[types[name]] if types and name in types else None
        writer.add_tensor(name, values, raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
