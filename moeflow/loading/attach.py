"""Puts a runtime behind a transformers model: its experts, the count of its passes, pruning.

Knows modules and their hooks. Knows nothing of budgets or tiers.
"""

import weakref
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from moeflow.calibration.pruning_thresholds import calibrate_pruning
from moeflow.calibration.windows import cut_windows
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface, forward, pretrained
from moeflow.hf.residual import ResidualTap
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime

_PRUNING_TOKENS = 2048  # on which thresholds are found


def attach_runtime(model: PreTrainedModel, runtime: ExpertRuntime, tap: ResidualTap | None) -> None:
    """Put a runtime behind the model's experts modules, as `model.moeflow`, and count its passes.

    Args:
        model: its experts taken off.
        runtime: of its experts.
        tap: the residual stream, for a predictor that asks for it.
    """
    for layer, (_, module) in enumerate(experts_interface.experts_modules(model)):
        module._moeflow = OffloadedExperts(runtime, layer, module, tap)
    model.moeflow = runtime
    model.save_pretrained = _refuse_to_save
    counted = weakref.ref(runtime)

    @torch.compiler.disable
    def count_pass(module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is None:
            ids = kwargs.get("inputs_embeds")
        if ids is None and args:
            ids = args[0]
        if ids is not None:
            cache = forward.cache_of(kwargs)
            shape = ids.shape[0], ids.shape[1], ids if ids.dim() == 2 else None
            describe = getattr(cache, "describe_pass", None)  # a cache that holds many sequences knows better
            num_sequences, num_positions, tokens = shape if describe is None else describe(ids)
            continues = forward.continues_cache(kwargs, num_positions)
            counted().begin_forward(num_sequences, num_positions, continues=continues, token_ids=tokens)
            if tap is not None:
                tap.listen(counted().predicting)

    model.base_model.register_forward_pre_hook(count_pass, with_kwargs=True)


def prune_experts(model: PreTrainedModel, folder: Path, share: float) -> None:
    """Find every layer's pruning threshold on text that any machine has, and set it.

    Args:
        model: with its runtime attached.
        folder: of the model, for its tokenizer.
        share: of the experts behind each token's first that are left out.
    """
    windows = cut_windows(pretrained.load_tokenizer(folder), None, _PRUNING_TOKENS)
    thresholds = calibrate_pruning(model, windows, skipped_share=share)
    model.moeflow.reset_stats()
    for (_, module), threshold in zip(experts_interface.experts_modules(model), thresholds, strict=True):
        module._moeflow.pruning = threshold


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        "this model's experts are not in its modules, so save_pretrained would write a model without them. Copy the "
        "checkpoint folder instead, or use moeflow pack."
    )
