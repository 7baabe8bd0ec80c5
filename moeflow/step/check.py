"""Compares a captured step with the model's own code: what depends on data or on Python's state shows here."""

import copy

import torch
from transformers import PreTrainedModel

from moeflow.hf.passes.forward import cache_argument, context_positions
from moeflow.hf.passes.growing_cache import GrowingCache
from moeflow.hf.passes.step_rows import StepRows
from moeflow.step.runner import StepRunner

_PREFIX = (3, 7, 2, 5)
_LONG_PREFIX = _PREFIX * 6  # where modules of the model look at more than the program: beyond small windows and blocks
_TOKEN = 4
_TOLERANCE = {torch.float32: 1e-4}  # of the largest logit
_HALF_TOLERANCE = 0.3  # halves are rounded after each operation, and a rounding may change a route
_ASSUMED_POSITIONS = 4096


@torch.no_grad()
def difference(model: PreTrainedModel, runner: StepRunner) -> str | None:
    """Run a token at a near, a far and the last position, both ways; of several rows, each at another one.

    Rows have prefixes of different lengths, padded on the left. One of the steps has dead rows.

    Args:
        model: that was captured.
        runner: of its program.

    Returns:
        How they differ; None where they agree.
    """
    cache, num_rows = GrowingCache.of_model(model), runner.num_rows
    if cache is None:
        return f"{type(model).__name__} keeps other state than keys and values"
    own, last = type(model).forward, (context_positions(model) or _ASSUMED_POSITIONS) - 1
    arguments = {**cache_argument(model, cache), "use_cache": True}
    prefix = _LONG_PREFIX if runner.bound.modules else _PREFIX
    ladder, row = sorted({len(prefix), last // 2, last}), torch.arange(num_rows)[:, None]
    firsts = row[:, 0] % len(_PREFIX)
    mask = (torch.arange(len(prefix) + 1) >= firsts[:, None]).long()
    if num_rows > 1:
        arguments["attention_mask"] = mask[:, :-1]
    own(model, input_ids=torch.tensor([prefix]) + row, **arguments)
    for turn in range(len(ladder)):
        positions = torch.tensor([ladder[(turn + number) % len(ladder)] for number in range(num_rows)])
        num_live = num_rows // 2 + 1 if turn == 1 else num_rows
        token = _TOKEN + row
        if num_rows > 1:
            arguments["attention_mask"] = mask
        beside, kept = copy.deepcopy(cache), copy.deepcopy(cache)
        arguments |= cache_argument(model, beside)
        expected = own(model, input_ids=token, position_ids=positions[:, None], **arguments).logits
        rows = StepRows(kept, token[:num_live], positions[:num_live], firsts[:num_live])
        if not runner.takes(StepRows(kept, token, positions, firsts)):
            return "its layers keep keys and values in other shapes than its step writes"
        made = runner.step(rows)
        most = float((made.float() - expected[:num_live].float()).abs().max() / expected.float().abs().max())
        if not most <= _TOLERANCE.get(made.dtype, _HALF_TOLERANCE):
            at = ", ".join(map(str, ladder))
            return f"at positions {at} the captured step differs from the model's own by {most:.1e} of its logits"
    return None
