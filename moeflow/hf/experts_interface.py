"""Routed experts as transformers has them: the interface through which it calls them, and the tensors that feed them.

Every family runs its experts through one interface; this file registers the function behind it. transformers' own
conversion mapping tells which checkpoint tensor feeds which expert, so that no list of architectures is kept.
"""

import re
from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch

from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.pieces import Feeding
from moeflow.errors import ConfigError, UnsupportedModelError
from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "moeflow"
_TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k",
)


class ExpertsModule(torch.nn.Module):
    """Attributes that all experts modules of transformers have; for annotations alone."""

    num_experts: int
    is_transposed: bool  # whether matrices are stored [in, out]
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    _is_hf_initialized: bool
    _moeflow: Any  # the `OffloadedExperts` that run in its place
    _absent: Any  # {name: `AbsentParameter`} of its parameters, which stay on disk


def _refuse_to_run(module: torch.nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        f'experts_implementation="{IMPLEMENTATION}" was given to transformers, and only load_moe can set it up: '
        "experts stay on disk until they are needed. Call moeflow.load_moe(folder, ...) in place of from_pretrained, "
        "or leave the option out."
    )


# The name under which transformers loads a model for load_moe. Modules with a runtime never ask the registry.
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _refuse_to_run)


def experts_modules(model: torch.nn.Module) -> list[tuple[str, ExpertsModule]]:
    """List the modules transformers runs through its experts interface, in the model's order.

    Raises:
        UnsupportedModelError: there is none.
    """
    marks = ("is_transposed", "has_bias", "has_gate", "_apply_gate")
    found = [
        (name, cast(ExpertsModule, module))
        for name, module in model.named_modules()
        if all(hasattr(module, mark) for mark in marks)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no routed experts that transformers runs through its experts interface: it is "
            "a dense model, or a family that cannot be offloaded. Load it with AutoModelForCausalLM.from_pretrained."
        )
    return found


def experts_arguments(args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the arguments of an experts module, as its hooks get them: hidden_states, top_k_index, top_k_weights."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    return (*args, *(kwargs[name] for name in names[len(args) :]))


def activation_of(module: ExpertsModule) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the activation between an expert's matrices: [n, 2I] or [n, I] in, [n, I] out."""
    return module._apply_gate if module.has_gate else module.act_fn


def has_post_norm(module: ExpertsModule) -> bool:
    """Tell whether an experts module normalises each expert's output."""
    return getattr(module, "has_post_expert_norm", False)


def post_norm(module: ExpertsModule, output: torch.Tensor) -> torch.Tensor:
    """Return an expert's output [n, H], normalised where the family has a norm there."""
    return module.post_expert_norm(output) if has_post_norm(module) else output


def gated_hidden(mlp: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return the input of a dense gated MLP's down projection: [T, H] in, [T, I] out."""
    return mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)


def transposed(model: torch.nn.Module) -> list[bool]:
    """Tell for each experts module whether it stores its matrices [in, out]."""
    return [bool(module.is_transposed) for _, module in experts_modules(model)]


def num_experts_per_tok(model: PreTrainedModel) -> int:
    """Return the largest number of experts a token is routed to, as the routers and the config name it.

    Raises:
        ConfigError: none at all, or more than a layer has.
    """
    owners: list[Any] = [model.config, model.config.get_text_config(decoder=True)]
    for path, module in experts_modules(model):
        block = model.get_submodule(path.rpartition(".")[0])
        owners += [module, getattr(module, "config", None), block, *block.children()]
    found: list[tuple[int, str]] = []
    for owner in owners:
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [(number, name) for number in values if type(number) is int]
    most, name = max(found, key=lambda entry: entry[0], default=(1, ""))  # the first of equals: the config's
    if most < 1:
        raise ConfigError(f"{name}={most}: a token needs an expert. Give 1 or more, or leave the config's.")
    held = max(getattr(module, "num_experts", most) for _, module in experts_modules(model))
    if most > held and name != "top_k":  # that name may be of something else
        raise ConfigError(f"{name}={most}: a layer has {held} experts. Give at most that, or leave the config's.")
    return most


def router_parameters(block: torch.nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Find a MoE block's router: its weight [E, H] and bias [E], each None where there is no single such parameter."""
    experts = next((module for module in block.children() if hasattr(module, "_apply_gate")), None)
    num_experts = getattr(experts, "num_experts", None)
    found = {
        name: parameter
        for name, parameter in block.named_parameters()
        if "shared" not in name and parameter.dim() == 2 and parameter.shape[0] == num_experts
    }
    if len(found) != 1:
        return None, None
    ((name, weight),) = found.items()
    bias = dict(block.named_parameters()).get(name.removesuffix("weight") + "bias")
    return weight, bias if bias is not None and bias.shape == weight.shape[:1] else None


def conversions(model: PreTrainedModel) -> tuple[list, list]:
    """Return transformers' rules for this model's checkpoints: renamings, and converters.

    Layers of multi-token prediction bring their own, which their model's names are in.
    """
    mapping: Any = getattr(model, "_moeflow_conversions", None) or get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]


def collect_expert_tensors(model: PreTrainedModel, tensors: dict[str, TensorEntry]) -> dict[str, Feeding]:
    """Group a checkpoint's tensors by the expert parameter they feed.

    Args:
        model: the empty model, experts still on it.
        tensors: the checkpoint's tensors by their names in the checkpoint.

    Returns:
        {parameter: its tensors}.
    """
    return collect_tensors(model, tensors, expert_parameters(model))


def expert_parameters(model: PreTrainedModel) -> set[str]:
    """Return the names of the routed experts' parameters."""
    return {f"{path}.{name}" for path, module in experts_modules(model) for name in module._parameters}


def collect_tensors(model: PreTrainedModel, tensors: dict[str, TensorEntry], wanted: set[str]) -> dict[str, Feeding]:
    """Group a checkpoint's tensors by the parameter they feed, by transformers' own conversion mapping.

    Args:
        model: the empty model, experts still on it.
        tensors: the checkpoint's tensors by their names in the checkpoint.
        wanted: the parameters; what feeds others is left out.

    Returns:
        {parameter: its tensors}.
    """
    parameters = model.state_dict()
    renamings, converters = conversions(model)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, Feeding] = {}
    for key in sorted(tensors, key=_natural_order):
        renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if renamed not in parameters and key in parameters:
            renamed, pattern = rename_source_key(key, [], [], model.base_model_prefix, parameters)
        converter = by_pattern[pattern] if pattern is not None else None
        targets = [renamed]
        if converter is not None and len(converter.target_patterns) > 1:
            first = converter.target_patterns[0]
            targets = [renamed.replace(first, target) for target in converter.target_patterns]
        if not wanted.intersection(targets):
            continue
        for place, target in enumerate(targets):
            feeding = collected.setdefault(target, Feeding(converter, {}, place))
            feeding.groups.setdefault(pattern or key, []).append((key, tensors[key]))
    for name, stored in model.all_tied_weights_keys.items():  # what has two places is stored once
        if name in wanted and name not in collected and stored in collected:
            collected[name] = collected[stored]
    return collected


def _natural_order(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
