"""Compares a captured step with the model's own code: what depends on data or on Python's state shows here."""

import copy
import itertools

import torch
from transformers import PreTrainedModel

from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.hf.passes.forward import cache_argument, context_positions
from moeflow.hf.passes.step_rows import SpanRows, StepRows
from moeflow.step.runner import StepRunner

_PREFIX = (3, 7, 2, 5)
_LONG_PREFIX = _PREFIX * 6  # where modules of the model look at more than the program: beyond small windows and blocks
_TOKEN = 4
_TOLERANCE = 1e-4  # of the largest logit, in float32
_HALF_TOLERANCE = 0.1  # halves are rounded after each operation; a rounding may change a route, of a few tokens
_HALF_TOKENS = 5  # so many at each position
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
    prefix, row = _LONG_PREFIX if runner.bound.modules else _PREFIX, torch.arange(num_rows)[:, None]
    ladder, firsts = sorted({len(prefix), last // 2, last}), row[:, 0] % len(prefix)
    mask = (torch.arange(len(prefix) + 1) >= firsts[:, None]).long()
    arguments = {"use_cache": True} | ({"attention_mask": mask} if num_rows > 1 else {})
    before = arguments | ({"attention_mask": mask[:, :-1]} if num_rows > 1 else {})
    own(model, input_ids=torch.tensor([prefix]) + row, **before, **cache_argument(model, cache))
    is_half = runner.bound.logits.dtype is not torch.float32
    tries = -(-_HALF_TOKENS // num_rows) if is_half else 1
    differs = torch.full((len(ladder), tries, num_rows), torch.nan)  # where a row ran at a position
    for turn, attempt in itertools.product(range(len(ladder)), range(tries)):
        token = _TOKEN + row + num_rows * attempt
        place = (turn + row[:, 0]) % len(ladder)
        positions = torch.tensor(ladder)[place]
        beside, mine = copy.deepcopy(cache), copy.deepcopy(cache)
        expected = own(
            model, input_ids=token, position_ids=positions[:, None], **arguments, **cache_argument(model, beside)
        ).logits.float()
        if not runner.takes(StepRows(mine, token, positions, firsts)):
            return "its layers keep keys and values in other shapes than its step writes"
        live = slice(num_rows // 2 + 1 if turn == 1 else num_rows)
        made = runner.step(StepRows(mine, token[live], positions[live], firsts[live]))
        found = (made.float() - expected[live]).abs().amax((1, 2)) / expected.abs().max()
        differs[place[live], attempt, row[live, 0]] = found.nan_to_num(torch.inf)
    return _reason(differs, ladder, is_half)


@torch.no_grad()
def spans_agree(model: PreTrainedModel, runner: StepRunner) -> bool:
    """Whether several tokens of one sequence see what rows that share its cache see: all before them, and no more.

    Args:
        model: that was captured.
        runner: of its program of two rows or more.
    """
    cache, num_rows, own = GrowingCache.of_model(model), runner.num_rows, type(model).forward
    assert cache is not None, "a program was compared"
    own(model, input_ids=torch.tensor([_PREFIX]), use_cache=True, **cache_argument(model, cache))
    span, mine = _TOKEN + torch.arange(num_rows)[None], copy.deepcopy(cache)
    expected = own(model, input_ids=span, use_cache=True, **cache_argument(model, cache)).logits[0].float()
    rows = StepRows(SpanRows(mine, num_rows), span.T, len(_PREFIX) + torch.arange(num_rows))
    if not runner.takes(rows):
        return False
    differs = (runner.step(rows)[:, 0].float() - expected).abs().amax(1) / expected.abs().max()
    is_half = runner.bound.logits.dtype is not torch.float32
    found = differs[:-1].median() if is_half else differs.amax()  # the last one sees all in any case
    return float(found.nan_to_num(torch.inf)) <= (_HALF_TOLERANCE if is_half else _TOLERANCE)


def _reason(differs: torch.Tensor, ladder: list[int], is_half: bool) -> str | None:
    """Say where a step differs; in half precision a few tokens may, but no half of a position's, nor all of a row's."""
    least, most_of = differs.nan_to_num(torch.inf, torch.inf), differs.nan_to_num(0, torch.inf)
    at_positions = differs.flatten(1).nanmedian(1).values if is_half else most_of.amax((1, 2))
    of_rows = least.amin((0, 1)) if is_half else most_of.amax((0, 1))
    most, tolerance = float(max(at_positions.max(), of_rows.max())), _HALF_TOLERANCE if is_half else _TOLERANCE
    if most <= tolerance:
        return None
    where = f"position {ladder[int(at_positions.argmax())]}"
    return f"at {where} the captured step differs from the model's own by {most:.1e} of its logits"
