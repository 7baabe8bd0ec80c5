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

from moeflow.c_library import c_function
from moeflow.placement.plan import Plan
from moeflow.placement.solvers import anneal_loop
from moeflow.placement.tables import Tables
from moeflow.random_bits import RandomBits

_MAX_GPUS = 1024  # size of the C loop's arrays on the stack
_CNumber = type["ctypes._SimpleCData[Any]"]
_TABLES: dict[str, _CNumber] = {
    "slots": c_int64, "tokens": c_double, "active": c_double, "arithmetic_s": c_double, "reading_s": c_double,
    "link_s": c_double, "weights": c_double, "traffic": c_double, "traffic_back": c_double, "distance": c_double,
    "transitions": c_double, "transitions_back": c_double, "crossing_s": c_double,
}  # fmt: skip
_ARRAYS: dict[str, _CNumber] = {
    "copy_expert": c_int64, "copy_gpu": c_int64, "holds": c_uint8, "num_copies": c_int64, "used": c_int64,
    "busy_s": c_double, "pull_s": c_double, "inflow": c_double, "outflow": c_double, "flow": c_double,
    "slowest_s": c_double,
}  # fmt: skip
_SIZES = ("layers", "experts", "gpus", "workloads", "copies", "most_copies", "free_slots", "may_replicate")


class _CTables(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in _SIZES] + [(name, POINTER(kind)) for name, kind in _TABLES.items()]


class _CState(ctypes.Structure):
    _fields_ = [*((name, POINTER(kind)) for name, kind in _ARRAYS.items()), ("random", c_uint64)]


class Annealing:
    """A placement under change.

    Args:
        tables: the problem.
        plan: the first placement, with as many copies a layer as the problem has slots to fill.
        seed: of the random numbers.

    Attributes:
        copy_expert, copy_gpu: [L, C], every copy. holds: [L, E, G]. num_copies: [L, E]. used: [L, G] slots.
        busy_s: [W, L, G], each GPU's seconds.
        pull_s: [L, E, G], seconds of traffic if all of an expert were on a GPU.
        inflow, outflow: [W, L, E, G], shares of transitions to each expert from each GPU, and from it to each.
        flow: [W, L - 1, G, G], shares of transitions. slowest_s: [W, L - 1], the slowest link.
    """

    def __init__(self, tables: Tables, plan: Plan, seed: int = 0):
        self.tables = tables
        mask = plan.mask()
        layers, experts, gpus = np.nonzero(mask)
        assert len(layers) == plan.num_layers * tables.num_copies, "a plan with another number of copies"
        self.copy_expert = np.ascontiguousarray(experts.reshape(plan.num_layers, -1), np.int64)
        self.copy_gpu = np.ascontiguousarray(gpus.reshape(plan.num_layers, -1), np.int64)
        self.holds = np.ascontiguousarray(mask, np.uint8)
        self.num_copies = np.ascontiguousarray(mask.sum(axis=2), np.int64)
        self.used = np.ascontiguousarray(mask.sum(axis=1), np.int64)
        self.random = RandomBits(seed)
        self.busy_s, self.pull_s = self._busy(), self._pull()
        self.inflow, self.outflow, self.flow, self.slowest_s = self._flows()

    def run(self, num_proposals: int, temperature: float) -> int:
        """Try changes at one temperature (seconds); return how many were kept."""
        loop = _c_loop()
        if loop is None or self.tables.problem.num_gpus > _MAX_GPUS:
            return anneal_loop.anneal(self.tables, self, num_proposals, temperature)
        tables, state = _c_tables(self.tables, self.copy_expert.shape[1]), _c_state(self)
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


def _c_tables(tables: Tables, num_copies: int) -> _CTables:
    out = _CTables(
        *tables.tokens.shape[1:], len(tables.slots), len(tables.weights), num_copies, tables.active.shape[3],
        tables.free_slots, tables.may_replicate,
    )  # fmt: skip
    for name, kind in _TABLES.items():
        if (array := getattr(tables, name)) is not None:
            setattr(out, name, array.ctypes.data_as(POINTER(kind)))
    return out


def _c_state(state: Annealing) -> _CState:
    pointers = [getattr(state, name).ctypes.data_as(POINTER(kind)) for name, kind in _ARRAYS.items()]
    return _CState(*pointers, state.random.state)


def _c_loop() -> Callable[..., int] | None:
    argtypes = (POINTER(_CTables), POINTER(_CState), c_int64, c_double)
    return c_function("anneal", __file__, argtypes, c_int64, without="placement searches a hundred times slower")
