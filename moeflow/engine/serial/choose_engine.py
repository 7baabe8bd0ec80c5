"""Which engine runs a model: the one of packed passes where it can, else the serial one."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.engine.engine import Engine
from moeflow.engine.serial.serial_engine import SerialEngine
from moeflow.errors import UnsupportedModelError


def engine_for(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_batch_size: int = 32,
    max_waiting: int | None = None,
    **limits: Any,
) -> Engine:
    """Return an engine that runs a model.

    Args:
        model: any that generates token by token.
        tokenizer: the model's.
        max_batch_size: the largest number of sequences that run at once, where several can.
        max_waiting: most requests beyond these.
        **limits: other arguments of `Engine`; those of passes over many sequences mean nothing where one runs at a
            time.

    Raises:
        ConfigError: a limit is not allowed.
        UnsupportedModelError: the model does not generate token by token.
    """
    try:
        return Engine(model, tokenizer, max_batch_size=max_batch_size, max_waiting=max_waiting, **limits)
    except UnsupportedModelError:
        known = {name: limits[name] for name in limits.keys() & {"kv_memory", "share_prefixes"}}
        waiting = None if max_waiting is None else max_waiting + max_batch_size - 1
        return SerialEngine(model, tokenizer, max_waiting=waiting, **known)
