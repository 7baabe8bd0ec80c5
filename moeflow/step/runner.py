"""Runs a bound step: natively from its start to the first layer that lacks an expert, and on from behind it."""

import ctypes
from bisect import bisect_left

import numpy as np
import torch

from moeflow.hf.passes.growing_cache import GrowingCache
from moeflow.kernels.cpu.step import DONE, StepLayer, StepState
from moeflow.moe.cpu_compute import CpuCompute
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime
from moeflow.step.bound import BoundProgram
from moeflow.step.program import KINDS, Instruction

_EXPERTS = KINDS.index("experts")


class StepRunner:
    """Runs one program of a model.

    Args:
        bound: the program in memory.
        runtime: of the model's experts.
        experts: [MoE layers].
    """

    def __init__(self, bound: BoundProgram, runtime: ExpertRuntime, experts: list[OffloadedExperts]) -> None:
        self.bound = bound
        self._runtime = runtime
        self._experts = experts
        self._body = bound.program.body
        num_rows = bound.program.num_rows
        of_layers = [(number, one) for number, one in enumerate(self._body) if one.kind == "experts"]
        self._numbers = [number for number, _ in of_layers]
        self._layer_of = [one.attributes["layer"] for _, one in of_layers]
        self._index = [bound.tensor(one.inputs[1]).numpy() for _, one in of_layers]
        self._addresses = np.zeros((len(experts), max(runtime.experts_per_layer)), np.int64)
        self._kernels: list[np.ndarray] = []  # addresses of each layer's kernels, read by the library
        self._resident = (StepLayer * len(experts))(*map(self._describe, experts))
        self._unknown = (StepLayer * len(experts))()  # of which every call is Python's
        self._firsts, self._lengths = np.zeros((2, num_rows), np.int64)
        self._seconds = np.zeros(len(KINDS))
        self._state = StepState(
            lengths=self._lengths.ctypes.data, firsts=self._firsts.ctypes.data, num_rows=num_rows, num_live=num_rows,
            seconds=self._seconds.ctypes.data,
        )  # fmt: skip

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all steps by kind of instruction."""
        return dict(zip(KINDS, self._seconds.tolist(), strict=True))

    def step(self, cache: GrowingCache, input_ids: torch.Tensor, position: int, first: int = 0) -> torch.Tensor:
        """Run one step of one sequence; the cache does not count it.

        Args:
            cache: what it has; it fits the program's layers.
            input_ids: [1, 1].
            position: of the token.
            first: the first position of the cache that is not padding.

        Returns:
            [1, 1, V], valid until the next step.

        Raises:
            ExpertReadError: an expert could not be read. The step may be run again.
            ClosedModelError: the runtime was closed.
        """
        inputs, state, kept = self.bound.inputs, self._state, cache.table(self.bound.kept_layers)
        inputs["input_ids"].copy_(input_ids.reshape(-1))
        inputs["position_ids"].fill_(position)
        self._lengths[:] = cache.length
        self._firsts[:] = first
        state.kept, state.num_threads = kept.ctypes.data, torch.get_num_threads()
        table = self._runtime.resident_table
        at = counted = 0  # instructions, and layers of experts, that are done
        while True:
            with self._runtime.holding() as may_go_unasked:
                table.write(self._addresses)
                state.layers = ctypes.addressof(self._resident if may_go_unasked else self._unknown)
                before = self._seconds[_EXPERTS]
                at = self.bound.code.run(at, state)
                reached = len(self._numbers) if at == DONE else bisect_left(self._numbers, at)
                if reached > counted:
                    spent = float(self._seconds[_EXPERTS] - before)
                    table.count(self._layer_of[counted:reached], self._index[counted:reached], spent)
            if at == DONE:
                return self.bound.logits
            instruction, counted = self._body[at], reached
            if instruction.kind == "experts":
                self._run_layer(instruction)
                counted += 1
            else:
                self.bound.call(instruction)
            at += 1

    def _run_layer(self, instruction: Instruction) -> None:
        x, index, weights = map(self.bound.tensor, instruction.inputs)
        made = self._experts[instruction.attributes["layer"]].run(x, index, weights)
        self.bound.tensor(instruction.outputs[0]).copy_(made)

    def _describe(self, experts: OffloadedExperts) -> StepLayer:
        """Describe a layer for the library; one that has other kernels stays Python's."""
        compute = experts.compute(self.bound.logits.dtype)
        if not isinstance(compute, CpuCompute) or experts.changes_routes:
            return StepLayer()
        records = self._runtime.records(experts.layer)
        kernels = np.array([compute.kernel(record).pointer for record in records], np.int64)
        self._kernels.append(kernels)
        addresses = self._addresses[experts.layer].ctypes.data
        return StepLayer(kernels.ctypes.data, addresses, len(records), compute.activation_bits)
