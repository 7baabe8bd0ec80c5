"""Chooses a format for each expert, from calibration text and an average width.

An average of 2.5 bits means bytes, not codes: the experts may take what uniform formats of 2 and 3 bits take on the
straight line between them, scales and zeros included.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.calibration.expert_statistics import ExpertStatistics
from moeflow.calibration.sensitivity import measure_experts
from moeflow.calibration.windows import cut_windows, varied_windows
from moeflow.convert.bit_allocation import Allocation, allocate
from moeflow.convert.calibrate import model_to_measure
from moeflow.errors import ConfigError
from moeflow.kernels.quantization.formats import FORMATS
from moeflow.progress import ShareCallback

WIDTHS = (1, 2, 3, 4, 8)
_WRITING_SHARE = 0.25  # of the time, where the model writes its own text


class MixedPrecision(NamedTuple):
    """A format for every expert.

    Args:
        formats: [num_layers][num_experts], names.
        allocation: the program's answer; cost and bound in estimated nats a token.
        statistics: the figures that decided.
        budget_bytes: allowed to all experts.
    """

    formats: list[list[str]]
    allocation: Allocation
    statistics: ExpertStatistics
    budget_bytes: int


def choose_formats(
    model: str | Path | PreTrainedModel,
    text: str | None = None,
    average_bits: float = 3.0,
    *,
    widths: Sequence[int] | None = None,
    group_size: int = 64,
    method: str = "hqq",
    num_tokens: int = 6144,
    tokenizer: PreTrainedTokenizerBase | None = None,
    miss_rates: np.ndarray | None = None,
    transfer_weight: float = 0.0,
    progress: ShareCallback = lambda share, stage: None,
) -> MixedPrecision:
    """Measure a model's experts on text and choose a format for each under a budget of bytes.

    Args:
        model: a checkpoint folder or hub id, which is loaded by load_moe (in float32 on a CPU); or a model of load_moe
            or from_pretrained.
        text: calibration text, like the text that the model will be used for, and not the text that it will be judged
            by. None takes text that the model writes itself on many topics, and the Python standard library.
        average_bits: between the smallest and the largest width.
        widths: bits that may be chosen; None takes 2, 3, 4 and 8, and 1 where the average is below 2.
        group_size: neighbours that share a scale: 32, 64 or 128.
        method: how the experts will be quantised, "rtn", "hqq" or "gptq".
        num_tokens: tokens of the text to use, in windows spread evenly over it. Layers' sensitivities are measured on
            the first four.
        tokenizer: the model's; None loads it from the folder.
        miss_rates: [L, E], how often a token makes the expert be fetched, for `transfer_weight`.
        transfer_weight: nats a token that one fetch of an expert of average size is as bad as.
        progress: called with (share done, the stage under way).

    Raises:
        ConfigError: an option is malformed, the text is shorter than a window, or the experts are quantised already.
        BudgetError: the average is below the smallest width.
    """
    widths = default_widths(average_bits) if widths is None else widths
    formats = _format_names(widths, group_size)
    _check_average(average_bits, sorted(widths))
    begin = _WRITING_SHARE if text is None else 0.0
    with model_to_measure(model, tokenizer) as (measured, tokenizer):
        if text is None:
            windows = varied_windows(
                measured, tokenizer, num_tokens, lambda done, of: progress(begin * done / of, "writing text")
            )
        else:
            windows = cut_windows(tokenizer, text, num_tokens)
        statistics = measure_experts(
            measured,
            windows,
            formats,
            method=method,
            progress=lambda done, of: progress(begin + (1 - begin) * done / of, "measuring experts"),
        )
    return allocate_formats(statistics, average_bits, miss_rates=miss_rates, transfer_weight=transfer_weight)


def allocate_formats(
    statistics: ExpertStatistics,
    average_bits: float,
    *,
    miss_rates: np.ndarray | None = None,
    transfer_weight: float = 0.0,
    gap: float = 1e-4,
) -> MixedPrecision:
    """Choose a format for each expert from statistics measured before.

    With `transfer_weight` a cost at format j grows by transfer_weight * miss_rate * bytes_j / mean bytes: what
    is fetched often gets fewer bits.

    Args:
        statistics: measured by `measure_experts`.
        average_bits: between the smallest and the largest width.
        miss_rates: [L, E] from 0 to 1, how often a token makes the expert be fetched.
        transfer_weight: nats a token that one fetch of an expert of average size is as bad as.
        gap: at which the program may stop.

    Raises:
        ConfigError: miss rates are missing, or of another model.
        BudgetError: the average is below the smallest width.
    """
    widths = [FORMATS[name].bits for name in statistics.formats]
    _check_average(average_bits, widths)
    sizes = statistics.expert_bytes()
    budget = int(sum(np.interp(average_bits, widths, row) for row in sizes.reshape(-1, len(widths))))
    costs = statistics.costs()
    if transfer_weight:
        if miss_rates is None or np.shape(miss_rates) != costs.shape[:2] or not transfer_weight > 0:
            raise ConfigError(
                f"transfer_weight={transfer_weight} needs miss_rates of shape {list(costs.shape[:2])} and a weight "
                f"above 0; miss_rates have shape {None if miss_rates is None else list(np.shape(miss_rates))}."
            )
        mean_bytes = budget / statistics.exists.sum()
        costs = costs + transfer_weight * np.asarray(miss_rates)[..., None] * sizes / mean_bytes
    allocation = allocate(costs, sizes, budget, gap=gap)
    formats = [
        [statistics.formats[j] for j in row[:count]]
        for row, count in zip(allocation.choice, statistics.num_experts, strict=True)
    ]
    return MixedPrecision(formats, allocation, statistics, budget)


def default_widths(average_bits: float) -> tuple[int, ...]:
    """Return the widths to choose between.

    An expert of one bit loses most of what it puts out. Errors of that size do not add up as the program takes them to,
    so that width is left to averages that cannot be had without it.
    """
    return WIDTHS if average_bits < 2 else WIDTHS[1:]


def _format_names(widths: Sequence[int], group_size: int) -> list[str]:
    names = [f"int{bits}-g{group_size}" for bits in sorted(set(widths))]
    unknown = [name for name in names if name not in FORMATS]
    if unknown or len(names) < 2:
        raise ConfigError(
            f"widths {list(widths)} with group_size={group_size} are not formats to choose between. Allowed: two or "
            f"more of {', '.join(map(str, WIDTHS))}, in groups of 32, 64 or 128."
        )
    return names


def _check_average(average_bits: float, widths: Sequence[int]) -> None:
    if not widths[0] <= average_bits <= widths[-1]:
        raise ConfigError(
            f"average_bits={average_bits} is outside the widths {', '.join(map(str, widths))}. Give one between them."
        )
