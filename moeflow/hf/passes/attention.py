"""Attention as transformers looks it up: for the passes of one thread, another takes the place of a model's own."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from moeflow.errors import UnsupportedModelError
from moeflow.fork import tell_of_forks
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

MaskRule = Callable[..., Any]  # (batch, head, query position, key position) -> bool
causal_rule: MaskRule = causal_mask_function
_NAME = "moeflow"
_FAR = (1 << 20) + 3  # a position that is the first of no chunk, on which a mask's rule is tried
_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


class Attending(Protocol):
    """What attends in place of a model's own attention."""

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as transformers' attention functions do.

        Args:
            module: the attention module.
            query: [batch, heads, positions, features].
            key: [batch, key-value heads, positions, features].
            value: likewise.
            attention_mask: what `mask` returned, if the module makes none itself.
            **kwargs: what the module gives its attention beside them.

        Returns:
            [batch, positions, heads, features], and the weights or None.
        """
        ...

    def mask(
        self, batch_size: int, q_length: int, mask_function: MaskRule, device: torch.device | None
    ) -> torch.Tensor | None:
        """Return what the model hands to its attention as the mask of a rule."""
        ...


_attending: ContextVar[Attending] = ContextVar("_attending")  # in the pass under way


class _Replaced:
    """A config whose attention is replaced, and the passes that want it so."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.own = config._attn_implementation
        self.num_passes = 0


class _Replacements:
    """The configs whose attention is replaced now, by id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_config: dict[int, _Replaced] = {}
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Begin anew in the child of a fork; what another thread of the parent's has replaced goes on as its own."""
        self._lock = threading.Lock()

    def own_implementation(self, config: Any) -> str:
        """Name the implementation that a config has where nothing is replaced."""
        replaced = self._of_config.get(id(config))
        return config._attn_implementation if replaced is None else replaced.own

    def add(self, config: Any) -> None:
        """Replace a config's attention for one more pass."""
        with self._lock:
            replaced = self._of_config.setdefault(id(config), _Replaced(config))
            replaced.num_passes += 1
            config._attn_implementation_internal = _NAME

    def remove(self, config: Any) -> None:
        """Take one pass back; the last puts the config's own attention in its place again."""
        with self._lock:
            replaced = self._of_config[id(config)]
            replaced.num_passes -= 1
            if not replaced.num_passes:
                config._attn_implementation_internal = replaced.own
                del self._of_config[id(config)]


_replacements = _Replacements()
own_implementation = _replacements.own_implementation


@contextmanager
def attention_replaced(model: PreTrainedModel, by: Attending) -> Iterator[dict[int, str]]:
    """Let `by` attend and make masks in the model's passes of this thread. In other threads the model's own goes on.

    Yields:
        The implementation that each config has otherwise, by the config's id: "sdpa" or "eager".
    """
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in found}
    before = {key: own_implementation(config) for key, config in configs.items()}
    own = {key: name if name == "eager" or not model._supports_sdpa else "sdpa" for key, name in before.items()}
    own = {key: name if name in ("eager", "sdpa") else "eager" for key, name in own.items()}
    replaced: list[Any] = []
    token = _attending.set(by)
    try:
        for config in configs.values():
            _replacements.add(config)
            replaced.append(config)
        yield own
    finally:
        _attending.reset(token)
        for config in replaced:
            _replacements.remove(config)


def unknown_attention(config: Any) -> str | None:
    """Say why a config's attention may compute otherwise than transformers' own; None where it is that.

    Args:
        config: of a model or of a part of it.
    """
    name = own_implementation(config)
    if name in (None, "eager") or (name == "sdpa" and ALL_ATTENTION_FUNCTIONS.get(name) is _SDPA):
        return None
    return f'its attention is "{name}" as the caller has it'


def attention_function(module: torch.nn.Module, implementation: str) -> Callable:
    """Return the function that an attention module would call with this implementation."""
    of_model = sys.modules[type(module).__module__]
    eager: Any = getattr(of_model, "eager_attention_forward", None)
    return getattr(of_model, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS).get_interface(implementation, eager)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    attending = _attending.get(None)
    if attending is not None:
        return attending.attention(module, query, key, value, attention_mask, **kwargs)
    own = attention_function(module, own_implementation(module.config))
    return own(module, query, key, value, attention_mask, **kwargs)


def _mask(batch_size: int, q_length: int, mask_function: MaskRule = causal_rule, **kwargs: Any) -> torch.Tensor | None:
    attending = _attending.get(None)
    if attending is not None:
        return attending.mask(batch_size, q_length, mask_function, kwargs.get("device"))
    own = ALL_MASK_ATTENTION_FUNCTIONS[own_implementation(kwargs["config"])]
    return own(batch_size, q_length, mask_function=mask_function, **kwargs)


# Models look both up by name.
ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _mask)


def window_and_chunk(allowed: MaskRule) -> tuple[int, int]:
    """Return the window and the chunk (0: none) by which a mask's rule limits what a position sees.

    Raises:
        UnsupportedModelError: it is another rule.
    """
    if allowed is causal_rule:
        return 0, 0
    with _disable_current_modes():
        first, second = (_first_seen(allowed, position) for position in (_FAR, _FAR + 1))
        window = _FAR - first + 1 if second == first + 1 else 0
        chunk = _last_seeing(allowed, first) - first + 1 if 0 < first == second else 0
        for position in (0, 1, 5, 33, 1000, _FAR - 77):
            expected = max(position - window + 1, 0) if window else position // chunk * chunk if chunk else 0
            if _first_seen(allowed, position) != expected:
                raise UnsupportedModelError("its attention masks follow a rule that is no window and no chunk")
    return window, chunk


def _first_seen(allowed: MaskRule, position: int) -> int:
    """Return the first position that one sees; all from there to its own must be seen."""
    seen = allowed(0, 0, torch.tensor([[position]]), torch.arange(position + 1)[None])[0]
    first = int(seen.int().argmax())
    if not bool(seen[first:].all()):
        raise UnsupportedModelError("its attention masks have holes")
    return first


def _last_seeing(allowed: MaskRule, position: int) -> int:
    """Return the last position that sees another."""
    later = torch.arange(position, 2 * _FAR)[:, None]
    return position + int(allowed(0, 0, later, torch.tensor([[position]]))[:, 0].sum()) - 1
