"""The problem of `moeflow place`: counts, the machine, and the size of a step."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeflow.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from moeflow.placement.problem import Problem
    from moeflow.placement.workload import Workload

_TOKENS, _HIDDEN_SIZE, _TOP_K = 4096, 4096, 8  # of a step, where neither options nor counts say it


def add_step_options(parser: ArgumentParser) -> None:
    """Add the options of a step to a parser."""
    step = parser.add_argument_group("the step", "what one forward of all GPUs together is")
    step.add_argument("--tokens", type=int, default=_TOKENS, metavar="N", help=f"tokens of a step ({_TOKENS})")
    step.add_argument(
        "--top-k", type=int, metavar="K", help=f"experts a token takes, where counts do not say ({_TOP_K})"
    )
    step.add_argument(
        "--hidden-size", type=int, default=_HIDDEN_SIZE, metavar="H", help=f"of the model, in bf16 ({_HIDDEN_SIZE})"
    )
    step.add_argument(
        "--expert-mb", type=float, metavar="MB", help="megabytes of one expert; without it memory is not checked"
    )
    step.add_argument("--expert-bits", type=float, default=16, metavar="B", help="bits of each weight of them (16)")
    step.add_argument(
        "--communication",
        default="auto",
        choices=("auto", "path", "dispatch"),
        help="dispatch: tokens go from their GPU to experts and back; path: from expert to expert; auto: dispatch, "
        "path with --max-imbalance (auto)",
    )


def read_problem(arguments: Namespace) -> tuple[Problem, list[Workload]]:
    """Return the problem that arguments name, and the workloads that are kept out of it.

    Raises:
        ConfigError: a number is out of range, or the counts lack what is asked of them.
        PlacementError: counts or topology are malformed, or nothing fits.
    """
    from dataclasses import replace

    from moeflow.placement.cost import StepShape
    from moeflow.placement.files.topology import load_topology
    from moeflow.placement.problem import Problem

    _check_step(arguments)
    topology = load_topology(arguments.topology, arguments.gpus)
    workloads, held_out = _workloads(arguments)
    if arguments.max_imbalance is not None and any(workload.transitions is None for workload in workloads):
        raise ConfigError(
            "--max-imbalance asks for few transitions between layers, and counts have none. Give a trace, or leave it "
            "out."
        )
    communication = arguments.communication
    if communication == "auto":  # engines dispatch; a limit of transitions is for one that goes from expert to expert
        communication = "dispatch" if arguments.max_imbalance is None else "path"
    top_k = known_top_k(arguments.top_k, workloads) or min(_TOP_K, workloads[0].num_experts)
    if arguments.expert_mb is None:
        topology = topology.without_memory_limits()
        # Three matrices, half as high as wide: between models of many small and of few large experts.
        expert_bytes = round(3 * arguments.hidden_size * arguments.hidden_size / 2 * arguments.expert_bits / 8)
    else:
        expert_bytes = round(arguments.expert_mb * 1e6)
    step = StepShape(
        assignments=float(arguments.tokens * top_k),
        token_bytes=2 * arguments.hidden_size,
        expert_bytes=expert_bytes,
        expert_flops=round(2 * 8 * expert_bytes / arguments.expert_bits),  # multiply and add for each weight
        communication=communication,
    )
    problem = Problem(tuple(workloads), topology, step, arguments.replicas, arguments.worst_case)
    replace(problem, workloads=(*workloads, *held_out))  # held-out workloads must be of the same model
    return problem, held_out


def known_top_k(given: int | None, workloads: Sequence[Workload]) -> int | None:
    """Return how many experts a token takes, as the option or the counts say; None where neither does.

    Raises:
        PlacementError: the two contradict each other, or layers have fewer experts.
    """
    known = {workload.top_k for workload in workloads if workload.top_k is not None}
    num_experts = workloads[0].num_experts
    if given is None:
        return max(known, default=None)
    if known - {given}:
        raise PlacementError(f"--top-k {given} contradicts the counts, which say {max(known)}. Leave it out.")
    if given > num_experts:
        raise PlacementError(f"--top-k {given} is out of range: a layer has {num_experts} experts.")
    return given


def _workloads(arguments: Namespace) -> tuple[list[Workload], list[Workload]]:
    from moeflow.trace.workloads import read_workload, split_workload

    if arguments.hold_out is None:
        workloads, held_out = [read_workload(path) for path in arguments.workloads], []
    else:
        parts = [split_workload(path, arguments.hold_out) for path in arguments.workloads]
        workloads, held_out = [seen for seen, _ in parts], [kept for _, kept in parts]
    return workloads, held_out + [read_workload(path) for path in arguments.validate]


def _check_step(arguments: Namespace) -> None:
    for name in ("tokens", "hidden_size", "top_k"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is out of range. Give at least 1.")
    if not 1 <= arguments.expert_bits <= 32:
        raise ConfigError(f"--expert-bits {arguments.expert_bits:g} is out of range. Give 1 to 32.")
    if arguments.expert_mb is not None and not 0 < arguments.expert_mb < float("inf"):
        raise ConfigError(f"--expert-mb {arguments.expert_mb:g} is no size. Give megabytes above 0.")
