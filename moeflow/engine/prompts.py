"""Prompts of an engine: token ids that its model knows, within the model's context.

Knows the tokenizer, the vocabulary and the context. Knows nothing of passes.
"""

from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError
from moeflow.hf.encoding import encode_text
from moeflow.hf.passes import forward


class Prompts:
    """The prompts of one model.

    Args:
        model: tells its tokens and its context.
        tokenizer: the model's; None where prompts are token ids.

    Attributes:
        context: positions the model was made for; None where its config does not say.

    Raises:
        ConfigError: the model's answers end at stop strings, which need a tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = forward.vocab_size(model)
        self.context = forward.context_positions(model)
        self._stop = forward.stop_strings(model)
        if self._stop and tokenizer is None:
            raise ConfigError(
                f"the model's generation settings end answers at {self._stop[0]!r} (stop_strings): give the engine the "
                "model's tokenizer as well."
            )

    def token_ids(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """Return a prompt's token ids, unchecked.

        Raises:
            ConfigError: neither text nor token ids, text that the tokenizer cannot read, a bias of a token that the
                model has not, or text, stop strings, a schema or a grammar without a tokenizer.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise ConfigError(f"a prompt is text or a list of token ids, this is a {type(prompt).__name__}.")
        if self._tokenizer is None and (isinstance(prompt, str) or params.stop):
            raise ConfigError("this engine has no tokenizer: give token ids and no stop strings, or a tokenizer.")
        if self._tokenizer is None and params.structure is not None:
            raise ConfigError(f"this engine has no tokenizer, which {params.structure[0]} needs: give it one.")
        unknown = [token for token in dict(params.logit_bias) if token >= self._vocab_size]
        if unknown:
            raise ConfigError(
                f"logit_bias has {unknown[0]}, which is no token id: they are 0 to {self._vocab_size - 1}."
            )
        if isinstance(prompt, str):
            assert self._tokenizer is not None, "refused above"
            return encode_text(self._tokenizer, prompt, self.context)
        return list(prompt)

    def stopping(self, params: SamplingParams) -> SamplingParams:
        """Return params with the stop strings of the generation settings, where they name none."""
        return params if params.stop or not self._stop else replace(params, stop=self._stop)

    def most_new_tokens(self, ids: list[int], params: SamplingParams) -> int:
        """Return the requested number of new tokens, cut to the room that the context has."""
        wanted = params.max_new_tokens
        return wanted if self.context is None else min(wanted, self.context - len(ids) + 1)

    def check(self, ids: list[int]) -> None:
        """Refuse token ids that the model cannot run.

        Raises:
            ConfigError: none at all, one that is no token, or more than the context has positions.
        """
        if not ids:
            raise ConfigError("the prompt is empty: give at least one token.")
        wrong = [token for token in ids if type(token) is not int or not 0 <= token < self._vocab_size]
        if wrong:
            raise ConfigError(
                f"the prompt has {wrong[0]!r}, which is no token id: they are 0 to {self._vocab_size - 1}."
            )
        if self.context is not None and len(ids) > self.context:
            raise ConfigError(
                f"the prompt has {len(ids):,} tokens, the model's context {self.context:,} positions. Shorten the "
                "prompt, or take a model with a longer context."
            )
