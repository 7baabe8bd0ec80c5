"""A conversation: its messages, the file they are saved in, and the prompt a model reads them as.

Knows the tokenizer and the length of the model's context; neither generates nor prints anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moeflow.atomic_file import write_atomically
from moeflow.errors import MoeflowError
from moeflow.hf.encoding import check_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """The messages so far: an optional system prompt, then user and assistant in turn.

    Args:
        system: the system prompt.
        turns: messages with "role" and "content".
    """

    def __init__(self, system: str | None = None, turns: Iterable[dict[str, str]] = ()) -> None:
        self.system = system
        self.turns = list(turns)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Every message, the system prompt first."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def save(self, path: Path) -> None:
        """Write the messages as JSON; a reader sees the old file or the whole new one.

        Raises:
            MoeflowError: the file cannot be written.
        """
        write_atomically(path, json.dumps(self.messages, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote, or any JSON list of messages with roles and text.

        Raises:
            MoeflowError: the file is missing, unreadable, not JSON, or not a conversation.
        """
        try:
            messages = json.loads(path.read_bytes())  # with or without a byte-order mark
        except OSError as error:
            raise MoeflowError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise MoeflowError(f"{path} is not JSON ({error}); /load takes a file that /save wrote") from error
        wanted = f"{path} is not a conversation: /load takes a JSON list of messages"
        if not isinstance(messages, list):
            raise MoeflowError(f"{wanted}, found {type(messages).__name__}")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise MoeflowError(f'{wanted} with "role" and "content" text; message {number} is something else')
            check_text(message["content"], f"message {number} of {path}")
        system = messages.pop(0)["content"] if messages and messages[0].get("role") == "system" else None
        roles = [message.get("role") for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise MoeflowError(f"{wanted} in which user and assistant take turns and the assistant is last")
        return cls(system, ({"role": m["role"], "content": m["content"]} for m in messages))

    def encode(self, tokenizer: PreTrainedTokenizerBase, context: int | None = None) -> torch.Tensor:
        """Return the prompt for the next answer, [1, num_prompt_tokens]; without a chat template, plain text.

        Args:
            tokenizer: the model's.
            context: the model's positions, if known: what is far longer is cut, and still longer than it.

        Raises:
            ConfigError: the chat template refuses the messages or leaves out what one of them says, or one is no text.
        """
        import torch

        from moeflow.hf.encoding import encode_messages

        return torch.tensor([encode_messages(tokenizer, self.messages, context)], dtype=torch.long)

    def fit(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
    ) -> tuple[torch.Tensor, int, int]:
        """Encode the conversation, forgetting its oldest exchanges until the answer has room.

        Args:
            model: its config names the context's length.
            tokenizer: the model's.
            max_new_tokens: tokens to keep free for the answer; more than half the context is never kept free.

        Returns:
            `(input_ids, max_new_tokens, num_forgotten)`: the prompt, the tokens there is room for, and the number
            of exchanges forgotten.

        Raises:
            MoeflowError: the last message alone does not fit.
        """
        from moeflow.hf.passes.forward import context_positions

        context = context_positions(model)
        input_ids, num_forgotten = self.encode(tokenizer, context), 0
        if context is None:
            return input_ids, max_new_tokens, num_forgotten
        while input_ids.shape[1] > context - min(max_new_tokens, context // 2) and len(self.turns) > 1:
            del self.turns[:2]
            num_forgotten += 1
            input_ids = self.encode(tokenizer, context)
        num_free = context - input_ids.shape[1]
        if num_free < 1:
            raise MoeflowError(
                f"this message takes {input_ids.shape[1]} tokens with what surrounds it, and the model's context "
                f"is {context}: shorten it"
            )
        return input_ids, min(max_new_tokens, num_free), num_forgotten
