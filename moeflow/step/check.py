"""Compares a captured step with the model's own code: what depends on data or on Python's state shows here."""

import copy

import torch
from transformers import PreTrainedModel

from moeflow.hf.passes.forward import cache_argument, context_positions
from moeflow.hf.passes.growing_cache import GrowingCache
from moeflow.step.runner import StepRunner

_PREFIX = (3, 7, 2, 5)
_LONG_PREFIX = _PREFIX * 6  # where modules of the model look at more than the program: beyond small windows and blocks
_TOKEN = 4
_TOLERANCE = {torch.float32: 1e-4}  # of the largest logit
_HALF_TOLERANCE = 5e-2  # halves are rounded after each operation
_ASSUMED_POSITIONS = 4096


@torch.no_grad()
def difference(model: PreTrainedModel, runner: StepRunner) -> str | None:
    """Run a token at a near, a far and the last position, both ways.

    Args:
        model: that was captured.
        runner: of its program.

    Returns:
        How they differ; None where they agree.
    """
    cache = GrowingCache.of_model(model)
    if cache is None:
        return f"{type(model).__name__} keeps other state than keys and values"
    own, last = type(model).forward, (context_positions(model) or _ASSUMED_POSITIONS) - 1
    token = torch.tensor([[_TOKEN]])
    arguments = {**cache_argument(model, cache), "use_cache": True}
    prefix = _LONG_PREFIX if runner.bound.modules else _PREFIX
    own(model, input_ids=torch.tensor([prefix]), **arguments)
    for position in sorted({len(prefix), last // 2, last}):
        positions = torch.tensor([[position]])
        beside = copy.deepcopy(cache)
        expected = own(model, **{**arguments, **cache_argument(model, beside)}, input_ids=token, position_ids=positions)
        made = runner.step(copy.deepcopy(cache), token, position)
        most = float((made.float() - expected.logits.float()).abs().max() / expected.logits.float().abs().max())
        if not most <= _TOLERANCE.get(made.dtype, _HALF_TOLERANCE):
            return f"at position {position} the captured step differs from the model's own by {most:.1e} of its logits"
    return None
