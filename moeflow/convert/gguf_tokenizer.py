"""A tokenizer as a GGUF file has it: llama.cpp's own byte-level BPE ("gpt2"), or sentencepiece's BPE ("llama").

Knows tokenizer.json. Knows nothing of weights.
"""

import json
from typing import Any

import gguf

from moeflow.errors import ConfigError, UnsupportedModelError
from moeflow.hf.gguf.text_splits import SPLITS


def write_tokenizer(writer: "gguf.GGUFWriter", tokenizer: Any, vocabulary: int, pre: str | None = None) -> None:
    """Add a tokenizer to a GGUF file's metadata.

    Args:
        writer: of the file.
        tokenizer: of transformers.
        vocabulary: rows of the model's embedding: tokens beyond it are left out, rows without one get a name.
        pre: llama.cpp's name of the way that text is cut before byte-level BPE; None to tell it from tokenizer.json.

    Raises:
        UnsupportedModelError: a kind of tokenizer that is not written.
        ConfigError: the way that text is cut is not known by name.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json, of which a GGUF file's tokens are made. Save the "
            "tokenizer with a newer transformers, which makes one: save_pretrained."
        )
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(f"tokenizer.json is of the kind {model.get('type')}; moeflow writes BPE alone.")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        kind, pre = "llama", pre or "default"
    else:
        kind, pre = "gpt2", pre or _pre_tokenizer(parts)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    tokens, types = _tokens(parts, tokenizer, vocabulary)
    writer.add_token_list(tokens)
    if kind == "llama":
        ranks = {merge.replace(" ", ""): rank for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(any(step.get("type") == "Prepend" for step in _normalizers(parts)))
    writer.add_token_types(types)
    if merges:  # an empty array has no element type to write; llama.cpp cuts by scores where it has them
        writer.add_token_merges(merges)
    _add_special(writer, tokenizer)


def _pre_tokenizer(parts: dict[str, Any]) -> str:
    """Return llama.cpp's name of the way that text is cut."""
    steps = parts.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    regexes = tuple(regex for step in steps for regex in _regexes(step))
    composes = any(step.get("type") == "NFC" for step in _normalizers(parts))
    whole_words = bool(parts["model"].get("ignore_merges"))
    found = [name for name, split in SPLITS.items() if (split.regexes, split.whole_words) == (regexes, whole_words)]
    # llama.cpp composes no letters, whatever the name says; moeflow does, where the name is of such a model.
    found.sort(key=lambda name: SPLITS[name].composes != composes)
    if found:
        return found[0]
    kinds = " ".join(str(step.get("type")) for step in steps)
    raise ConfigError(
        f"how tokenizer.json cuts text ({kinds}) has no name that moeflow knows. Give llama.cpp's with --pre; its "
        "convert_hf_to_gguf.py lists them."
    )


def _regexes(step: dict[str, Any]) -> list[str]:
    """Return what a step of a pre-tokenizer splits by."""
    kind = step.get("type")
    if kind == "Digits" and step.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "Split" and step.get("behavior") == "Isolated":
        return [step["pattern"].get("Regex", "")]
    if kind == "ByteLevel":
        return list(SPLITS["gpt-2"].regexes) if step.get("use_regex", True) else []
    return [f"{kind}"]  # no regex of any name


def _normalizers(parts: dict[str, Any]) -> list[dict[str, Any]]:
    normalizer = parts.get("normalizer") or {}
    return normalizer.get("normalizers", [normalizer])


def _tokens(parts: dict[str, Any], tokenizer: Any, vocabulary: int) -> tuple[list[str], list[int]]:
    """Return each row's token and its type."""
    words = {number: word for word, number in parts["model"]["vocab"].items()}
    special = {added["id"]: added["special"] for added in parts.get("added_tokens", [])}
    words |= {added["id"]: added["content"] for added in parts.get("added_tokens", [])}
    unknown = words.get(tokenizer.unk_token_id) if parts["model"].get("unk_token") else None
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if parts["model"].get("byte_fallback") else set()
    tokens = [words.get(number, f"[PAD{number}]") for number in range(vocabulary)]

    def kind(number: int) -> gguf.TokenType:
        if number not in words:
            return gguf.TokenType.UNUSED
        if words[number] == unknown:
            return gguf.TokenType.UNKNOWN
        if number in special:
            return gguf.TokenType.CONTROL if special[number] else gguf.TokenType.USER_DEFINED
        return gguf.TokenType.BYTE if words[number] in bytes_ else gguf.TokenType.NORMAL

    return tokens, [kind(number) for number in range(vocabulary)]


def _add_special(writer: "gguf.GGUFWriter", tokenizer: Any) -> None:
    """Add the special tokens, whether text begins and ends with them, and the chat template."""
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
