"""Simulated annealing of a placement: load and communication in one objective, changed step by step.

The objective is `Problem.objective` of the mean over the workloads. A layer's transfers count by the slowest pair of
GPUs, as there, or by the mean over all pairs. The mean is never above the slowest and quick to follow, and a search far
from its end does better with it, since a maximum says nothing of all the pairs below it.

Knows problems and plans. The inner loop is `_anneal.c`, or `anneal_loop.py` where that was not built.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_double, c_int64, c_uint8, c_uint64
from typing import Any

import numpy as np

from moeflow.c_library import array_pointer, c_function
from moeflow.errors import PlacementError
from moeflow.placement.plan import Plan
from moeflow.placement.solvers import anneal_loop
from moeflow.placement.tables import Tables
from moeflow.random_bits import RandomBits

_MAX_GPUS = 1024  # size of the C loop's arrays on the stack
_CNumber = type["ctypes._SimpleCData[Any]"]
# Letters name the axes: workloads W, layers L, pairs of layers T, experts E, GPUs G, copies C, most copies R.
_TABLES: dict[str, tuple[_CNumber, str]] = {
    "slots": (c_int64, "G"), "tokens": (c_double, "WLE"), "active": (c_double, "WLER"), "arithmetic_s": (c_double, "G"),
    "reading_s": (c_double, "G"), "link_s": (c_double, "G"), "weights": (c_double, "W"), "traffic": (c_double, "TEE"),
    "traffic_back": (c_double, "TEE"), "distance": (c_double, "GG"), "transitions": (c_double, "WTEE"),
    "transitions_back": (c_double, "WTEE"), "crossing_s": (c_double, "GG"),
}  # fmt: skip
_ARRAYS: dict[str, tuple[_CNumber, str]] = {
    "copy_expert": (c_int64, "LC"), "copy_gpu": (c_int64, "LC"), "holds": (c_uint8, "LEG"),
    "num_copies": (c_int64, "LE"), "used": (c_int64, "LG"), "busy_s": (c_double, "WLG"), "pull_s": (c_double, "LEG"),
    "inflow": (c_double, "WLEG"), "outflow": (c_double, "WLEG"), "flow": (c_double, "WTGG"),
    "slowest_s": (c_double, "WT"),
}  # fmt: skip
_FLOWS = ("inflow", "outflow", "flow", "slowest_s")  # empty where the slowest link does not count
_SIZES = ("layers", "experts", "gpus", "workloads", "copies", "most_copies", "free_slots", "may_replicate")


class _CTables(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in _SIZES] + [(name, POINTER(kind)) for name, (kind, _) in _TABLES.items()]


class _CState(ctypes.Structure):
    _fields_ = [*((name, POINTER(kind)) for name, (kind, _) in _ARRAYS.items()), ("random", c_uint64)]


class Annealing:
    """A placement under change.

    Args:
        tables: the problem.
        plan: the first placement, with as many copies a layer as the problem has slots to fill.
        seed: of the random numbers.

    Raises:
        PlacementError: a plan of another problem.

    Attributes:
        copy_expert, copy_gpu: [L, C], every copy. holds: [L, E, G]. num_copies: [L, E]. used: [L, G] slots.
        busy_s: [W, L, G], each GPU's seconds.
        pull_s: [L, E, G], seconds of traffic if all of an expert were on a GPU.
        inflow, outflow: [W, L, E, G], shares of transitions to each expert from each GPU, and from it to each.
        flow: [W, L - 1, G, G], shares of transitions. slowest_s: [W, L - 1], the slowest link.
    """

    def __init__(self, tables: Tables, plan: Plan, seed: int = 0) -> None:
        self.tables = tables
        mask = plan.mask()
        copies, used = mask.sum(axis=(1, 2)), mask.sum(axis=1)
        wanted = (*tables.tokens.shape[1:], len(tables.slots))
        if mask.shape != wanted or (copies != tables.num_copies).any() or (used > tables.slots).any():
            raise PlacementError(
                f"the plan has {list(mask.shape)} layers, experts and GPUs and {copies.min()} to {copies.max()} copies "
                f"a layer, the problem {list(wanted)}, {tables.num_copies} copies and slots {tables.slots.tolist()}. "
                "Give a plan of this problem."
            )
        _, experts, gpus = np.nonzero(mask)
        self.copy_expert = np.ascontiguousarray(experts.reshape(plan.num_layers, -1), np.int64)
        self.copy_gpu = np.ascontiguousarray(gpus.reshape(plan.num_layers, -1), np.int64)
        self.holds = np.ascontiguousarray(mask, np.uint8)
        self.num_copies = np.ascontiguousarray(mask.sum(axis=2), np.int64)
        self.used = np.ascontiguousarray(used, np.int64)
        self.random = RandomBits(seed)
        self.busy_s, self.pull_s = self._busy(), self._pull()
        self.inflow, self.outflow, self.flow, self.slowest_s = self._flows()

    def run(self, num_proposals: int, temperature: float) -> int:
        """Try changes at one temperature (seconds); return how many were kept."""
        loop = _c_loop()
        if loop is None or self.tables.problem.num_gpus > _MAX_GPUS:
            return anneal_loop.anneal(self.tables, self, num_proposals, temperature)
        sizes = _sizes(self.tables)
        tables, state = _c_tables(self.tables, sizes), _c_state(self, sizes)
        kept = loop(byref(tables), byref(state), num_proposals, temperature)
        self.random.state = state.random
        return kept

    def objective(self) -> float:
        """Return the seconds that annealing lowers."""
        busy = float(self.tables.weights @ self._busy().max(axis=2).sum(axis=1))
        if self.tables.transitions is not None:
            return busy + float(self.tables.weights @ self._flows()[3].sum(axis=1))
        return busy + 0.5 * float((self._pull() * self._shares()).sum())  # each pair of layers counts on both sides

    def plan(self) -> Plan:
        """Return the placement as it is now."""
        return Plan.of_mask(self.holds.astype(bool))

    def check_integrity(self) -> None:
        """Assert that the arrays kept by small changes equal those of the placement."""
        assert (self.holds.sum(axis=2) == self.num_copies).all(), "copies"
        assert (self.holds.sum(axis=1) == self.used).all(), "used slots"
        assert (self.used <= self.tables.slots).all(), "slots"
        layer = np.arange(len(self.holds))[:, None]
        assert self.holds[layer, self.copy_expert, self.copy_gpu].all(), "the list of copies"
        assert _close(self.busy_s, self._busy()), "busy seconds"
        assert _close(self.pull_s, self._pull()), "traffic"
        for kept, fresh in zip((self.inflow, self.outflow, self.flow, self.slowest_s), self._flows(), strict=True):
            assert _close(kept, fresh), "flows"

    def _shares(self) -> np.ndarray:
        return self.holds / self.num_copies[:, :, None]

    def _busy(self) -> np.ndarray:
        seconds = self.tables.seconds(self.num_copies)
        return np.ascontiguousarray(np.where(self.holds, seconds, 0.0).sum(axis=2))

    def _pull(self) -> np.ndarray:
        pull = np.zeros(self.holds.shape)
        if self.tables.traffic is not None:
            shares, distance = self._shares(), self.tables.distance
            for layer, traffic in enumerate(self.tables.traffic):
                pull[layer] += traffic @ (shares[layer + 1] @ distance.T)
                pull[layer + 1] += traffic.T @ (shares[layer] @ distance)
        return pull

    def _flows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        transitions, shares = self.tables.transitions, self._shares()
        if transitions is None:
            return np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0)
        inflow = np.zeros((len(transitions), *shares.shape))
        outflow = np.zeros_like(inflow)
        inflow[:, 1:] = self.tables.transitions_back @ shares[:-1]
        outflow[:, :-1] = transitions @ shares[1:]
        flow = np.ascontiguousarray(shares[:-1].transpose(0, 2, 1) @ outflow[:, :-1])
        slowest = (flow * self.tables.crossing_s).max(axis=(2, 3), initial=0.0)
        return inflow, outflow, flow, slowest


def _close(kept: np.ndarray, fresh: np.ndarray) -> bool:
    """Return whether sums kept by small changes are right; rounding errors are measured against the largest sum."""
    return np.allclose(kept, fresh, rtol=1e-9, atol=1e-12 * np.abs(fresh).max(initial=0.0))


def _sizes(tables: Tables) -> dict[str, int]:
    """Return the numbers of workloads, layers, experts, most copies, GPUs, copies and transitions, by letter."""
    workloads, layers, experts, most = tables.active.shape
    sizes = {"W": workloads, "L": layers, "E": experts, "R": most, "G": len(tables.slots), "C": tables.num_copies}
    return {**sizes, "T": layers - 1}


def _pointer(owner: object, name: str, kind: _CNumber, letters: str, sizes: dict[str, int]) -> Any:
    return array_pointer(getattr(owner, name), kind, tuple(sizes[letter] for letter in letters))


def _c_tables(tables: Tables, sizes: dict[str, int]) -> _CTables:
    out = _CTables(*(sizes[letter] for letter in "LEGWCR"), tables.free_slots, tables.may_replicate)
    for name, (kind, letters) in _TABLES.items():
        if getattr(tables, name) is not None:
            setattr(out, name, _pointer(tables, name, kind, letters, sizes))
    return out


def _c_state(state: Annealing, sizes: dict[str, int]) -> _CState:
    out = _CState(random=state.random.state)
    for name, (kind, letters) in _ARRAYS.items():
        if name not in _FLOWS or state.tables.transitions is not None:
            setattr(out, name, _pointer(state, name, kind, letters, sizes))
    return out


def _c_loop() -> Callable[..., int] | None:
    argtypes = (POINTER(_CTables), POINTER(_CState), c_int64, c_double)
    return c_function("anneal", __file__, argtypes, c_int64, without="placement searches a hundred times slower")
