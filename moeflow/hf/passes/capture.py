"""Takes the decode step of a model: one new token of each of a few sequences, as a functional graph of torch's.

Attention with its keys and values, experts, linears and norms are single nodes of the graph, so that it knows neither
how long a sequence is nor where an expert lies.
"""

import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes import forward
from moeflow.hf.passes.attention import MaskRule, attention_replaced, causal_rule
from moeflow.hf.passes.capture_gate import capture_gate
from moeflow.hf.passes.twin import twin_of

_UNUSED = {"position_ids", "cache_position"}  # tensors that attention functions get and do not use
_FAR = (1 << 20) + 3  # a position that is the first of no chunk, on which a mask's rule is tried

_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? sinks, int layer, float scale, int window, int chunk, "
    "float soft_cap) -> Tensor"
)


@torch.library.register_fake("moeflow::attend")
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, layer: int, *rest: Any
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


class _Handed(forward.KeyValueCache):
    """Stands in for a key-value cache and for attention: hands both to the graph as one node a layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._handed: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}  # {id of keys: (layer, keys, values)}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return them as they are."""
        self._handed[id(key_states)] = layer_idx, key_states, value_states
        return key_states, value_states

    def mask(
        self, batch_size: int, q_length: int, mask_function: MaskRule, device: torch.device | None
    ) -> torch.Tensor:
        """Return a tensor that models pass on, with the window and the chunk of the rule on it."""
        carrier = torch.ones(batch_size, 1, q_length, 1, dtype=torch.bool, device=device)
        carrier.rule = _rule_of(mask_function)  # type: ignore[attr-defined]
        return carrier

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Add the node of a layer's attention.

        Raises:
            UnsupportedModelError: the module hands over more than it.
        """
        layer, keys, values = self._handed.get(id(key), (0, None, None))
        if keys is not key or values is not value:
            raise UnsupportedModelError(f"{type(module).__name__} attends with other keys and values than it keeps")
        unknown = [name for name, found in kwargs.items() if isinstance(found, torch.Tensor) and name not in _UNUSED]
        rule = getattr(attention_mask, "rule", None)
        if unknown or rule is None:
            what = f"gives its attention {unknown[0]}" if unknown else "makes its attention masks itself"
            raise UnsupportedModelError(f"{type(module).__name__} {what}")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.ops.moeflow.attend(query, key, value, s_aux, layer, scale, *rule, softcap or 0.0)
        return out, None

    @property
    def is_compileable(self) -> bool:
        """Never."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return a length at which a model decodes."""
        return 1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return what the mask function does not look at."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no most."""
        return -1


class _Step(torch.nn.Module):
    """The step as a module of token ids and positions, [rows, 1] each."""

    def __init__(self, model: PreTrainedModel, cache: _Handed) -> None:
        super().__init__()
        self.model = model
        self._arguments = forward.cache_argument(model, cache)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=True, **self._arguments).logits


def capture(model: PreTrainedModel, num_rows: int) -> torch.export.ExportedProgram:
    """Take the decode step of a model.

    Args:
        model: loaded, with its runtime.
        num_rows: sequences, one new token each.

    Returns:
        The graph of (input_ids, position_ids), [num_rows, 1] int64 each, to logits [num_rows, 1, V].

    Raises:
        UnsupportedModelError: the step depends on data, or the model attends in a way of its own.
    """
    ids, positions = torch.full((num_rows, 1), 3), torch.full((num_rows, 1), 5)
    cache = _Handed()
    try:
        with capture_gate.capturing(), torch.no_grad(), attention_replaced(model, cache), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own code about itself
            exported = torch.export.export(_Step(twin_of(model), cache).eval(), (ids, positions), strict=False)
            return exported.run_decompositions({})
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever the model's own code raises, or what torch says of data-dependent control
        raise UnsupportedModelError(
            f"the step of {type(model).__name__} cannot be captured ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _rule_of(allowed: MaskRule) -> tuple[int, int]:
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
