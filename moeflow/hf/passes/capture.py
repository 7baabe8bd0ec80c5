"""Takes the decode step of a model: one new token of each of a few sequences, as a functional graph of torch's.

Attention with its keys and values, experts, linears and norms are single nodes of the graph, so that it knows neither
how long a sequence is nor where an expert lies.
"""

import warnings
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes import forward
from moeflow.hf.passes.attention import (
    MaskRule,
    attention_function,
    attention_replaced,
    own_implementation,
    window_and_chunk,
)
from moeflow.hf.passes.caches.growing_cache import GrowingCache, GrowingLayer
from moeflow.hf.passes.capture_gate import capture_gate
from moeflow.hf.passes.kept_state import StateName, put_state, state_names, state_of
from moeflow.hf.passes.own_modules import OwnCall, OwnModules, attention_modules
from moeflow.hf.passes.twin import twin_of

_UNUSED = {"position_ids", "cache_position"}  # tensors that attention functions get and do not use

_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? sinks, int layer, float scale, int window, int chunk, "
    "float soft_cap) -> Tensor"
)

_LIBRARY.define(
    "attend_latent(Tensor query, Tensor latent, Tensor turned, Tensor weight, int layer, float scale, int window, "
    "int chunk) -> Tensor"
)


@torch.library.register_fake("moeflow::attend_latent")
def _(query: torch.Tensor, latent: torch.Tensor, turned: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    heads = query.shape[1]
    features = weight.shape[0] // heads - (query.shape[3] - turned.shape[3])
    return query.new_empty(query.shape[0], query.shape[2], heads, features)


@torch.library.register_fake("moeflow::attend")
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None, layer: int, *rest: Any
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


class CapturedStep(NamedTuple):
    """The step of a model.

    Args:
        exported: the graph of (input_ids, position_ids, states) to (logits, new states).
        states: what the model keeps beside keys and values, in the order of the graph's inputs.
        own_calls: modules that stay the model's Python, by the numbers of their nodes.
    """

    exported: torch.export.ExportedProgram
    states: list[StateName]
    own_calls: list[OwnCall]


class _OwnNeeded(UnsupportedModelError):
    """A layer's attention has no instruction."""

    def __init__(self, layer: int | None, message: str) -> None:
        super().__init__(message)
        self.layer = layer


class _Handed(forward.KeyValueCache):
    """Stands in for a key-value cache and for attention: hands both to the graph as one node a layer.

    Args:
        layers: of a cache after a prompt, whose states the step's own take the place of.
    """

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)
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
        try:
            carrier.rule = window_and_chunk(mask_function)  # type: ignore[attr-defined]
        except UnsupportedModelError as error:  # where attention uses it; models make masks for no layer, too
            carrier.refusal = str(error)  # type: ignore[attr-defined]
        return carrier

    def attention(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Add the node of a layer's attention.

        Raises:
            UnsupportedModelError: the module hands over more than an instruction takes.
        """
        try:
            return self._attention(module, *args, **kwargs)
        except UnsupportedModelError as error:
            raise _OwnNeeded(getattr(module, "layer_idx", None), str(error)) from error

    def _attention(
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
        if attention_mask is None and not hasattr(module, "layer_idx"):  # to nothing that is kept
            own = attention_function(module, own_implementation(module.config))
            return own(module, query, key, value, None, scaling=scaling, **kwargs)
        layer, keys, values = self._handed.get(id(key), (0, None, None))
        latents = None
        if keys is not key or values is not value:
            latents = self._latents_of(module, key, value)
            if latents is None:
                raise UnsupportedModelError(f"{type(module).__name__} attends with other keys and values than it keeps")
        unknown = [name for name, found in kwargs.items() if isinstance(found, torch.Tensor) and name not in _UNUSED]
        rule = getattr(attention_mask, "rule", None)
        refusal = getattr(attention_mask, "refusal", None)
        if refusal is not None:
            raise UnsupportedModelError(refusal)
        if unknown or rule is None:
            what = f"gives its attention {unknown[0]}" if unknown else "makes its attention masks itself"
            raise UnsupportedModelError(f"{type(module).__name__} {what}")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if latents is not None:
            if s_aux is not None or softcap:
                raise UnsupportedModelError(f"{type(module).__name__} has sinks or a soft cap on latents")
            return torch.ops.moeflow.attend_latent(query, *latents, scale, *rule), None
        out = torch.ops.moeflow.attend(query, key, value, s_aux, layer, scale, *rule, softcap or 0.0)
        return out, None

    def _latents_of(self, module: Any, key: torch.Tensor, value: torch.Tensor) -> tuple | None:
        """Return latent, turned key, weight and layer where keys and values were expanded of what the layer keeps.

        A wrong guess shows where the captured step is compared with the model's own.
        """
        own = getattr(module, "layer_idx", None)
        found = [handed for handed in self._handed.values() if handed[0] == own]
        weight = getattr(getattr(module, "kv_b_proj", None), "weight", None)
        if len(found) != 1 or weight is None or module.kv_b_proj.bias is not None or not hasattr(module, "expand_kv"):
            return None
        layer, latent, turned = found[0]
        features = latent.shape[-1]
        heads, plain = key.shape[1], key.shape[-1] - turned.shape[-1]
        if weight.shape != (heads * (plain + value.shape[-1]), features) or latent.shape[1] != 1:
            return None
        return latent, turned, weight, layer

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
    """The step as a module of token ids and positions, [rows, 1] each, and states."""

    def __init__(self, model: PreTrainedModel, cache: _Handed, names: list[StateName]) -> None:
        super().__init__()
        self.model = model
        self._layers, self._names = cache.layers, names
        self._arguments = forward.cache_argument(model, cache)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, states: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[Any]]:
        for name, state in zip(self._names, states, strict=True):
            put_state(self._layers, name, state.clone())  # which the model may change in place
        out = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=True, **self._arguments)
        return out.logits, [state_of(self._layers, name) for name in self._names]


def capture(model: PreTrainedModel, num_rows: int) -> CapturedStep:
    """Take the decode step of a model.

    Args:
        model: loaded, with its runtime.
        num_rows: sequences, one new token each.

    Returns:
        The graph of (input_ids, position_ids), [num_rows, 1] int64 each, and states to logits [num_rows, 1, V] and
        new states.

    Raises:
        UnsupportedModelError: the step depends on data, or the model attends in a way of its own.
    """
    cache = GrowingCache.of_model(model)
    if cache is None:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no keys and values")
    model = twin_of(model)
    own_layers = cache.own_layers()
    while True:
        try:
            return _capture(model, num_rows, OwnModules(attention_modules(model, own_layers)))
        except _OwnNeeded as needed:
            if needed.layer is None or needed.layer in own_layers:
                raise
            own_layers |= _layers_like(model, needed.layer)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever the model's own code raises, or what torch says of data-dependent control
            raise UnsupportedModelError(
                f"the step of {type(model).__name__} cannot be captured ({type(error).__name__}: {str(error)[:200]})"
            ) from error


def _capture(model: PreTrainedModel, num_rows: int, own: OwnModules) -> CapturedStep:
    layers = _layers_after_prompt(model, num_rows, own)
    names = state_names(layers)
    states = [state for name in names if (state := state_of(layers, name)) is not None]
    inputs = torch.full((num_rows, 1), 3), torch.full((num_rows, 1), 5), states
    handed = _Handed(layers)
    step = _Step(model, handed, names).eval()
    before = [dict(vars(layer)) for layer in layers]
    with (
        capture_gate.capturing(), torch.no_grad(), attention_replaced(model, handed), own.handed(),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")  # of torch's own code about itself
        exported = torch.export.export(step, inputs, strict=False).run_decompositions({})
    for layer, was in zip(layers, before, strict=True):  # tensors of the graph among what a layer keeps
        if any(was.get(name) is not value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)):
            raise UnsupportedModelError(f"{type(model).__name__} changes a layer of its cache outside of its attention")
    return CapturedStep(exported, names, own.calls)


def _layers_like(model: PreTrainedModel, layer: int) -> set[int]:
    """Return the layers whose attention is of the kind of this one's."""
    kinds = {type(module) for module in attention_modules(model, {layer}).values()}
    return {layer} | {getattr(module, "layer_idx", layer) for module in model.modules() if type(module) in kinds}


def _layers_after_prompt(model: PreTrainedModel, num_rows: int, own: OwnModules) -> list[Any]:
    """Return the layers of a cache after a prompt, of which a step's states have their sizes; none for plain ones."""
    cache = GrowingCache.of_model(model)
    assert cache is not None
    if all(type(layer) is GrowingLayer for layer in cache.layers) and not own.modules:
        return []
    with torch.no_grad(), own.watched():
        arguments: dict[str, Any] = {**forward.cache_argument(model, cache), "use_cache": True}
        type(model).forward(model, input_ids=torch.tensor([[3, 5]] * num_rows), **arguments)
    return list(cache.layers)
