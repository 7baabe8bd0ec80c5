"""Tiers of one GPU, host memory and disk: a 0-1 program over all layers that puts each expert on one tier.

    minimise sum uses[l, e] seconds[l, e, tier] x[l, e, tier]   with   sum_tier x = 1,   GPU and host within their bytes

uses are per token; seconds are those of bringing the expert to the GPU. A faster tier saves more for bytes of more use,
so filling tiers by use is optimal where all experts are of one size. Otherwise it is the start, the linear relaxation's
dual is the bound, and the program closes the gap between them.

Compares the plan, too, with caches that move experts while they run. The caller gives the caches' hit rates, since the
order of tokens is not known here.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.tier_program import fill_in_order, improve_tiers, total
from moeflow.placement.workload import Workload

TIERS = ("gpu", "host", "disk")


@dataclass(frozen=True)
class TierPlan:
    """The tier of each expert.

    Args:
        tier: [L, E] int, index in TIERS.
        rates: [3], expected share of (token, expert) assignments whose expert is on each tier; the first: hit rate.
        s_per_token: expected seconds a token waits for transfers, none of them hidden.
        bound: no choice within the budgets waits less.
        seconds: the search's time.
        status: "optimal", "feasible" (the search ended, within 1e-4 of the bound) or "time limit".
    """

    tier: np.ndarray
    rates: tuple[float, float, float]
    s_per_token: float
    bound: float
    seconds: float
    status: str

    @property
    def hit_rate(self) -> float:
        return self.rates[0]

    @property
    def gap(self) -> float:
        """(s_per_token - bound) / bound; 0 where they agree, infinite without a bound."""
        if self.s_per_token <= self.bound * (1 + 1e-12):
            return 0.0
        return (self.s_per_token - self.bound) / self.bound if self.bound > 0 else math.inf


@dataclass(frozen=True)
class CacheAdvice:
    """Whether experts should stay on their tiers or move.

    Args:
        best: "static", or the name of a cache.
        s_per_token: seconds a token waits, of "static" and of each cache.
        saved_s_per_token: seconds that the best cache saves over static; negative where static is better.
    """

    best: str
    s_per_token: dict[str, float]
    saved_s_per_token: float


def choose_tiers(
    workload: Workload,
    expert_bytes: float | np.ndarray,
    *,
    gpu_bytes: float,
    host_bytes: float = math.inf,
    host_bytes_per_s: float = 20e9,
    disk_bytes_per_s: float | None = 2e9,
    top_k: int | None = None,
    seed: int = 0,
    time_limit_s: float = 60.0,
    solver: str = "auto",
) -> TierPlan:
    """Choose each expert's tier so that a token is expected to wait least for transfers.

    Args:
        workload: load [L, E].
        expert_bytes: of every expert, or [L, 1] of each layer's, or [L, E].
        gpu_bytes: for experts on the GPU, 0 or more.
        host_bytes: for the other experts, in host memory.
        host_bytes_per_s: from host memory to the GPU.
        disk_bytes_per_s: from disk to host memory; experts on disk take both ways. None: there is no disk.
        top_k: experts a token takes in a layer; the workload's where it knows.
        seed: of the solver.
        time_limit_s: of the solver, if one is needed.
        solver: see `moeflow.integer_program`.

    Raises:
        PlacementError: an impossible size, budget or rate, an unknown top_k, or no disk where one is needed.
    """
    begin = time.perf_counter()
    sizes = _sizes(workload, expert_bytes)
    top_k = workload.top_k if top_k is None else top_k
    if top_k is None:
        raise PlacementError(f"{workload.name} does not say how many experts a token takes: give top_k.")
    if top_k > workload.num_experts:
        raise PlacementError(f"top_k is {top_k}, and layers of {workload.name} have {workload.num_experts} experts.")
    rates = {"top_k": top_k, "host_bytes_per_s": host_bytes_per_s}
    if disk_bytes_per_s is not None:
        rates["disk_bytes_per_s"] = disk_bytes_per_s
    for name, value in {**rates, "gpu_bytes": gpu_bytes, "host_bytes": host_bytes}.items():
        if not (value > 0 or (value == 0 and name not in rates)):
            raise PlacementError(f"{name} is {value}. It must be {'above 0' if name in rates else '0 or more'}.")
    uses = (workload.shares() * top_k).ravel()
    costs = _costs(uses, sizes, host_bytes_per_s, disk_bytes_per_s)
    budgets = (float(gpu_bytes), float(host_bytes))
    tier = fill_in_order(sizes, budgets, np.argsort(-uses, kind="stable"))
    bound, ended = total(costs, tier), True
    if sizes.min() < sizes.max():
        tier, bound, ended = improve_tiers(
            sizes, costs, budgets, tier, seed=seed, time_limit_s=time_limit_s, solver=solver
        )
    cost = total(costs, tier)
    if not math.isfinite(cost):
        raise PlacementError(
            f"{workload.name}'s experts take {sizes.sum():,.0f} bytes, and no way was found to put all of them into "
            f"{gpu_bytes:,.0f} on the GPU and {host_bytes:,.0f} in host memory. Give the disk's rate, or more memory."
        )
    status = "optimal" if cost <= bound * (1 + 1e-9) else "feasible" if ended else "time limit"
    return TierPlan(
        tier=tier.reshape(workload.shape),
        rates=_rates(uses, tier),
        s_per_token=cost,
        bound=min(bound, cost),
        seconds=time.perf_counter() - begin,
        status=status,
    )


def judge_tiers(
    plan: TierPlan,
    workload: Workload,
    expert_bytes: float | np.ndarray,
    *,
    top_k: int,
    host_bytes_per_s: float = 20e9,
    disk_bytes_per_s: float | None = 2e9,
) -> TierPlan:
    """Return a plan with its rates and waiting on a workload that it was not chosen by; no bound holds there.

    Args:
        plan: the tier of each expert.
        workload: load [L, E].
        expert_bytes, host_bytes_per_s, disk_bytes_per_s: as in `choose_tiers`.
        top_k: experts a token takes in a layer.

    Raises:
        PlacementError: an impossible size.
    """
    uses, tier = (workload.shares() * top_k).ravel(), plan.tier.ravel()
    costs = _costs(uses, _sizes(workload, expert_bytes), host_bytes_per_s, disk_bytes_per_s)
    return replace(plan, rates=_rates(uses, tier), s_per_token=total(costs, tier), bound=0.0)


def static_or_dynamic(plan: TierPlan, hit_rates: Mapping[str, float]) -> CacheAdvice:
    """Compare a plan with caches that keep as many bytes on the GPU and move experts as tokens come.

    A cache's miss is assumed to wait as long as the plan's average miss: as often on disk, as large.

    Args:
        plan: the tier of each expert.
        hit_rates: name of a cache -> share of the assignments that it hits on the GPU, from a replay of a trace.

    Raises:
        PlacementError: no cache, a hit rate outside 0 to 1, or a plan that never misses.
    """
    if not hit_rates:
        raise PlacementError("no cache to compare with: give the hit rate of one or more.")
    for name, rate in hit_rates.items():
        if not 0 <= rate <= 1:
            raise PlacementError(f"cache {name} hits {rate} of the assignments. Give a share from 0 to 1.")
    if plan.hit_rate >= 1:
        raise PlacementError("every expert that is used stays on the GPU: there is nothing to move.")
    miss_s = plan.s_per_token / (1 - plan.hit_rate)
    seconds = {"static": plan.s_per_token, **{name: (1 - rate) * miss_s for name, rate in hit_rates.items()}}
    best = min(seconds, key=lambda name: seconds[name])  # ties go to the first: static, where nothing moves
    return CacheAdvice(best, seconds, plan.s_per_token - min(seconds[name] for name in hit_rates))


def _sizes(workload: Workload, expert_bytes: float | np.ndarray) -> np.ndarray:
    """Return the checked sizes, [N] float64."""
    try:
        sizes = np.broadcast_to(np.asarray(expert_bytes, np.float64), workload.shape)
    except (TypeError, ValueError):
        raise PlacementError(
            f"expert_bytes have shape {list(np.shape(expert_bytes))}. Give one number, [{workload.num_layers}, 1] or "
            f"{list(workload.shape)}."
        ) from None
    if not (np.isfinite(sizes) & (sizes > 0)).all():
        raise PlacementError(f"expert_bytes begin at {sizes.min()}. They must be above 0 and finite.")
    return sizes.ravel()


def _costs(uses: np.ndarray, sizes: np.ndarray, host_bytes_per_s: float, disk_bytes_per_s: float | None) -> np.ndarray:
    """[N, 3] seconds a token waits for each expert on each tier; infinite where there is no such tier."""
    costs = np.full((len(uses), 3), np.inf)
    moved = uses * sizes
    costs[:, 0] = 0.0
    costs[:, 1] = moved * (1 / host_bytes_per_s)
    if disk_bytes_per_s is not None:
        costs[:, 2] = moved * (1 / host_bytes_per_s + 1 / disk_bytes_per_s)
    return costs


def _rates(uses: np.ndarray, tier: np.ndarray) -> tuple[float, float, float]:
    """[3], the share of the uses on each tier."""
    gpu, host, disk = (float(uses[tier == number].sum() / uses.sum()) for number in range(3))
    return gpu, host, disk
