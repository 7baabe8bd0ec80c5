"""Compares a captured step with the model's own code: what depends on data or on Python's state shows here."""

import torch
from transformers import PreTrainedModel

from moeflow.hf.passes.forward import cache_argument, context_positions
from moeflow.hf.passes.growing_cache import GrowingCache
from moeflow.step.runner import StepRunner

_PREFIX = (3, 7, 2, 5)
_TOKEN = 4
_TOLERANCE = {torch.float32: 1e-4}  # of the largest logit
_HALF_TOLERANCE = 0.3  # halves are rounded after each operation, and a rounding may change a route
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
    own(model, input_ids=torch.tensor([_PREFIX]), **arguments)
    for position in sorted({len(_PREFIX), last // 2, last}):
        positions = torch.tensor([[position]])
        expected = own(model, input_ids=token, position_ids=positions, **arguments).logits
        cache.crop(-1)
        made = runner.step(cache, token, position)
        most = float((made.float() - expected.float()).abs().max() / expected.float().abs().max())
        if not most <= _TOLERANCE.get(made.dtype, _HALF_TOLERANCE):
            return f"at position {position} the captured step differs from the model's own by {most:.1e} of its logits"
    return None
