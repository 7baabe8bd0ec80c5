"""The marks by which a family of models writes reasoning and tool calls, as transformers' response templates.

A tokenizer that brings a `response_template` is read by it. Else the marks are found in its chat template.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_THINK = {"open": "<think>", "close": "</think>", "content": "text"}
_TOOL_CALLS = {
    "<|channel|>": {  # gpt-oss
        "open_pattern": r"<\|channel\|>commentary to=functions\.(?P<name>[\w-]+)"
        r"[^<]*(?:<\|constrain\|>\w+)?<\|message\|>",
        "close": "<|call|>",
        "repeats": True,
        "content": "json",
        "transform": _CALL,
    },
    "<function=": {  # Qwen3-Coder, Qwen3.5
        "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
        "transform": _CALL,
    },
    "<arg_key>": {  # GLM-4.5
        "open_pattern": r"\s*<tool_call>\s*(?P<name>[^<\s]+)",
        "close": "</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            "tag_pattern": r"<arg_key>\s*(?P<key>.*?)\s*</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
        },
        "transform": _CALL,
    },
    "<tool_call>": {  # Hermes, Qwen3, Granite
        "open_pattern": r"\s*<tool_call>",
        "close": "</tool_call>",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
    "[ARGS]": {  # Mistral since 2025
        "open_pattern": r"\s*(?:\[TOOL_CALLS\])?\s*(?P<name>[\w-]+)\[ARGS\]",
        "close": "[TOOL_CALLS]",  # that of the next call
        "repeats": True,
        "content": "json",
        "transform": _CALL,
    },
    "[TOOL_CALLS]": {  # Mistral before
        "open_pattern": r"\s*\[TOOL_CALLS\]\s*",
        "content": "json",
        "transform_each": True,
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
    },
}
HERMES = "<tool_call>"
"""The marks in which calls are asked for where the chat template knows no tools."""

_HARMONY_REASONING = {
    "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
    "close_pattern": r"<\|end\|>",
    "content": "text",
}
_HARMONY_CONTENT = {
    "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)<\|message\|>",
    "close_pattern": r"<\|end\|>|<\|return\|>",
    "content": "text",
}


class Marks(NamedTuple):
    """How answers of a model are read.

    Args:
        template: a response template of transformers; None where an answer is nothing but text.
        are_special: whether marks are special tokens, so that the answer's text must show them.
        prefilled: marks that a prompt may end with, because the chat template begins the answer.
    """

    template: dict[str, Any] | None
    are_special: bool = False
    prefilled: tuple[str, ...] = ()


def marks_of(tokenizer: PreTrainedTokenizerBase, *, calls: bool, family: str | None = None) -> Marks:
    """Return the marks of a tokenizer's model.

    Args:
        tokenizer: with its chat template.
        calls: whether tool calls are read; else what looks like one is text.
        family: of `_TOOL_CALLS`, where the chat template does not say; as of `HERMES`.
    """
    own = getattr(tokenizer, "response_template", None)
    special = {str(token) for token in tokenizer.all_special_tokens}
    if own is not None and family is None:
        fields = {name: field for name, field in own["fields"].items() if calls or name != "tool_calls"}
        return Marks({**own, "fields": fields}, any(token in str(own) for token in special))
    written = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    fields = {}
    if "<|channel|>" in written:
        fields |= {"reasoning_content": _HARMONY_REASONING, "content": _HARMONY_CONTENT}
    else:
        if "<think>" in written or "</think>" in written:
            fields["reasoning_content"] = _THINK
        fields["content"] = {"content": "text"}
    if calls:
        family = family or next((mark for mark in _TOOL_CALLS if mark in written), None)
        if family is not None:
            fields["tool_calls"] = _TOOL_CALLS[family]
    if len(fields) == 1:
        return Marks(None)
    template = {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\A", "fields": fields}
    marks = re.findall(r"<[|/]?\w+[|]?>|\[TOOL_CALLS\]", str(fields).replace("\\", ""))
    return Marks(template, any(mark in special for mark in marks), ("<think>",) if "<think>" in str(fields) else ())
