r"""How text is split before byte-level BPE, by `tokenizer.ggml.pre`: regexes in Oniguruma's words, one after another.

A GGUF file only names the kind, and llama.cpp knows what the name means. The regexes here are those of the models' own
tokenizer.json where llama.cpp tells them beside its own, which stand for some of them only nearly (\p{Lu} is [^a-z]).

Kinds that are left out are refused: tokens of a wrong split look right and make a model worse. Among them is "default",
and a file without any kind, which comes from converters older than the kinds: for those llama.cpp only guesses.
"""

from typing import NamedTuple


class Split(NamedTuple):
    """How text is split.

    Args:
        regexes: each splits what the ones before it left; what none matches is a piece as well.
        whole_words: whether a piece that is a token is taken as it is, with no regard to merges.
        adds_bos: whether a text begins with the token of beginnings where the file does not say.
        composes: whether letters and their marks are composed first (NFC), as the models' own tokenizers do.
    """

    regexes: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False
    composes: bool = False


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(upper: str, lower: str, ending: str) -> str:
    """Words that end where small letters are followed by capitals."""
    before = r"[^\r\n\p{L}\p{N}]?"
    return f"{before}{upper}*{lower}+{ending}|{before}{upper}+{lower}*{ending}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_GPT4O = rf"{_cased(_UPPER, _LOWER, _SHORT + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_cased(_UPPER, _LOWER, '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI_WORD = _cased(_UPPER[:-1] + _NO_HAN, _LOWER[:-1] + _NO_HAN, _SHORT + "?")
_KIMI = rf"\p{{Han}}+|{_KIMI_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_EXAONE_MOE = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_SIGN_AND_LETTERS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
)
_DEEPSEEK = rf"{_SIGN_AND_LETTERS}[\r\n]*|{_SPACES}"
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    f"\ufe30-\ufe4f]+|[\u3105-\u312f]+|{_HAN_KANA}"
)
# Letters with a case, as DeepSeek's first tokenizers list them: fewer than Unicode has by now.
_DEEPSEEK_LETTERS = (
    "\\s?[A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_DEEPSEEK_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_KINDS: tuple[tuple[str, Split], ...] = (
    (
        "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 mpt jais trillion granite-docling",
        Split((_GPT2,)),
    ),
    ("olmo", Split((_GPT2,), composes=True)),
    (
        "smollm starcoder refact codeshell exaone minerva-7b mellum2",
        Split((r"\p{N}", _GPT2)),
    ),
    ("command-r", Split((r"\p{N}", _GPT2), composes=True)),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        Split((_LLAMA3,), whole_words=True, adds_bos=True),
    ),
    ("dbrx smaug-bpe glm4 chatglm-bpe", Split((_LLAMA3,))),
    ("qwen2", Split((_QWEN2,), composes=True)),
    ("qwen35", Split((_QWEN35,), composes=True)),
    ("deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2", Split((_QWEN2,))),
    ("ufakzeka", Split((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}",))),
    ("laguna", Split((r"[^\n]+|[\n]+", _QWEN2))),
    ("tekken", Split((_TEKKEN,), whole_words=True, adds_bos=True)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", Split((_GPT4O,))),
    ("kimi-k2", Split((_KIMI,))),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Split((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK))),
    (
        "deepseek-llm",
        Split((r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_SIGNS, r"\s+$", _DEEPSEEK_HAN, r"\p{N}")),
    ),
    ("deepseek-coder", Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}"))),
    (
        "spark2_5",
        Split((r"\p{N}{1,3}", _HAN_KANA, rf"{_SIGN_AND_LETTERS}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    ),
    (
        "youtu",
        Split((_YOUTU, _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}")), whole_words=True),
    ),
    ("bailingmoe bailingmoe2 llada-moe", Split((_BAILING,))),
    ("seed-coder", Split((_SEED,))),
    ("exaone-moe", Split((_EXAONE_MOE,))),
    ("minicpm5", Split((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), whole_words=True)),
)
SPLITS: dict[str, Split] = {name: split for names, split in _KINDS for name in names.split()}
