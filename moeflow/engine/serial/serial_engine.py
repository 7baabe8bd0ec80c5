"""Serial engine: the engine's requests, one sequence at a time, for families that a packed pass cannot run.

Knows its runner. Knows nothing of what a family keeps.
"""

import logging
import sys
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.engine import Engine
from moeflow.engine.kv_cache.budget import kv_budget, shared_budget
from moeflow.engine.kv_cache.kv_format import format_named
from moeflow.engine.kv_cache.policies.protocol import KeyValuePolicy
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.sequence import Images
from moeflow.engine.serial.serial_runner import SerialRunner
from moeflow.engine.speculation.options import SpeculationOption
from moeflow.errors import ConfigError
from moeflow.memory_size import MemorySize
from moeflow.policy.key_value_policies import KeyValuePolicyOption
from moeflow.turns import in_turn

_logger = logging.getLogger(__name__)


class SerialEngine(Engine):
    """Runs requests one after the other by `generate`'s own steps; in all else as `Engine`.

    When a request ends, the model's cache is kept. A prompt that begins with all tokens that it covers goes on with it.

    Args:
        model: that generates token by token, of `load_moe` or any other of transformers.
        tokenizer: the model's; None where prompts are token ids and no text is wanted.
        kv_memory: most bytes of the caches that are kept; that of the running sequence comes on top.
        share_prefixes: whether any is kept.
        max_waiting: most requests beyond the one that runs; None for any number.
        kv_format: "auto" alone: caches keep what they keep. None: as the model was loaded.
        kv_policy: None alone. "auto": as the model was loaded.
        jump_forward: as of `Engine`.
        speculation: as of `Engine`; there is none, and stats() says why.

    Raises:
        ConfigError: kv_memory is no size, kv_format, kv_policy or speculation are not these, the model was loaded with
            one budget of experts and keys and values, or its stop strings need a tokenizer.
        UnsupportedModelError: the model does not generate token by token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        kv_memory: MemorySize = "auto",
        share_prefixes: bool = True,
        max_waiting: int | None = None,
        kv_format: str | None = None,
        kv_policy: KeyValuePolicyOption = "auto",
        jump_forward: bool = True,
        speculation: SpeculationOption = "auto",
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            max_batch_size=1,
            max_step_tokens=sys.maxsize,  # a prompt is one call of generate
            kv_memory=kv_memory,
            share_prefixes=share_prefixes,
            max_waiting=max_waiting,
            kv_format=kv_format,
            kv_policy=kv_policy,
            jump_forward=jump_forward,
            speculation=speculation,
        )

    def _make_runner(  # type: ignore[override]
        self, kv_memory: MemorySize, kv_format: str, policy: KeyValuePolicy | None
    ) -> SerialRunner:
        if shared_budget(self.model) is not None:
            raise ConfigError(
                "memory= is one budget of experts and keys and values, and what is kept for one sequence at a time "
                "(other states, images) is not counted in it. Load with expert_memory and kv_memory in its place."
            )
        if format_named(kv_format) is not None:
            raise ConfigError(
                f'kv_format="{kv_format}" is not possible: {type(self.model).__name__} runs one sequence at a time in '
                'its own cache. Leave kv_format="auto".'
            )
        if policy is not None:
            raise ConfigError(
                f'kv_policy="{policy.name}" is not possible: {type(self.model).__name__} runs one sequence at a time '
                "in its own cache. Leave kv_policy=None."
            )
        return SerialRunner(self.model, kv_budget(kv_memory, self.model))

    @in_turn
    def add_with_images(
        self, token_ids: list[int], images: Images, params: SamplingParams, *, id: str | None = None, priority: int = 0
    ) -> str:
        """Queue a request whose prompt shows images, and return its id.

        Args:
            token_ids: the prompt, as many tokens for each image as the model sees of it.
            images: what stands there, of `encode_with_images`.
            params: what is asked of the answer; no log-probabilities of the prompt.
            id: as of `add`.
            priority: as of `add`.

        Raises:
            ConfigError: as of `add`, or log-probabilities of the prompt are asked for.
            QueueFullError: as of `add`.
            ClosedModelError: the engine was closed.
        """
        if params.prompt_logprobs is not None:
            raise ConfigError("prompt_logprobs are of texts; this prompt has images. Leave them out.")
        id = self.add(token_ids, params, id=id, priority=priority)
        if id in self._requests:  # not where it was refused at once
            self._requests[id].sequence.images = images
        return id

    def save_kept(self, folder: str | Path) -> int:
        """Write nothing: caches of a family's own kind have no form in files. Returns 0 tokens."""
        self._check_open()
        return 0

    def load_kept(self, folder: str | Path) -> int:
        """Return 0 tokens, with a warning in the log that conversations of this family are not kept in files."""
        self._check_open()
        _logger.warning("%s: conversations are kept in memory alone, none in %s", type(self.model).__name__, folder)
        return 0
