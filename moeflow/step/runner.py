"""Runs a bound step: natively from its start to the first layer that lacks an expert, and on from behind it."""

import ctypes
from bisect import bisect_left
from typing import Any

import numpy as np
import torch

from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.hf.passes.own_modules import OwnCall, call_module, remembered
from moeflow.hf.passes.step_rows import StepRows
from moeflow.kernels.cpu.layer import LayerKernel
from moeflow.kernels.cpu.step import DONE, StepLayer, StepState
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime
from moeflow.step.bound import BoundProgram
from moeflow.step.program import KINDS

_EXPERTS = KINDS.index("experts")


class StepRunner:
    """Runs one program of a model.

    Args:
        bound: the program in memory.
        runtime: of the model's experts.
        experts: [MoE layers].

    Attributes:
        num_rows: of the program.
        is_of_one: whether only a cache of one sequence has all that the program reads and writes.
    """

    def __init__(self, bound: BoundProgram, runtime: ExpertRuntime, experts: list[OffloadedExperts]) -> None:
        self.bound = bound
        self.num_rows = bound.program.num_rows
        self._runtime = runtime
        self._experts = experts
        self._body = bound.program.body
        num_rows = self.num_rows
        of_layers = [(number, one) for number, one in enumerate(self._body) if one.kind == "experts"]
        self._numbers = [number for number, _ in of_layers]
        self._layer_of = [one.attributes["layer"] for _, one in of_layers]
        self._index = [bound.tensor(one.inputs[1]).numpy() for _, one in of_layers]
        self._own_calls: list[OwnCall] = [one.attributes["call"] for one in self._body if one.kind == "own"]
        self.is_of_one = bool(self._own_calls or bound.program.state_names)
        self._tensors = [list(map(bound.tensor, (*one.inputs, one.outputs[0]))) for _, one in of_layers]
        self._kernels: list[LayerKernel] = []  # read by the library
        self._resident = (StepLayer * len(experts))(*map(self._describe, experts))
        self._unknown = (StepLayer * len(experts))()  # of which every call is Python's
        self._firsts, self._lengths = np.zeros((2, num_rows), np.int64)
        self._kept = np.zeros((len(bound.kept_layers), num_rows, 3), np.int64)
        self._is_done = np.zeros(1, np.int64)
        self._seconds = np.zeros(len(KINDS))
        self._state = StepState(
            lengths=self._lengths.ctypes.data, firsts=self._firsts.ctypes.data, num_rows=num_rows, num_live=num_rows,
            seconds=self._seconds.ctypes.data, kept=self._kept.ctypes.data,
            is_done=self._is_done.ctypes.data,
        )  # fmt: skip

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all steps by kind of instruction."""
        return dict(zip(KINDS, self._seconds.tolist(), strict=True))

    def step(self, rows: StepRows) -> torch.Tensor:
        """Run one step of as many sequences as the program has rows, or fewer; what keeps them counts it.

        Behind an error or an interrupt it counts the step if that was done, and is as before if not.

        Args:
            rows: the sequences.

        Returns:
            [rows, 1, V], valid until the next step.

        Raises:
            ExpertReadError: an expert could not be read. The step may be run again.
            ClosedModelError: the runtime was closed.
        """
        self._is_done[0] = 0  # until the library sets it: no interrupt comes between that and what it has written
        kept: Any = rows.kept
        back = [remembered(kept.layers[call.layer]) for call in self._own_calls]
        try:
            return self._step(rows)
        except BaseException:
            if not self._is_done[0]:
                for bring_back in back:
                    bring_back()
            raise
        finally:
            if self._is_done[0]:
                rows.kept.advance(self.bound.kept_layers)

    def routes(self) -> np.ndarray:
        """Return what the rows of the last step took: [rows, L, K] ids, of which E or more stands for none.

        L counts all layers of the runtime, those that are no part of a step too.
        """
        num_rows, counts = self._state.num_live, self._runtime.experts_per_layer
        top_k = max(index.shape[1] for index in self._index)
        routes = np.full((num_rows, len(counts), top_k), max(counts), np.int64)
        for layer, index in zip(self._layer_of, self._index, strict=True):
            routes[:, layer, : index.shape[1]] = index[:num_rows]
        return routes

    def last_hidden(self) -> torch.Tensor | None:
        """Return what the head made the logits of in the last step, [rows, H]; None where the program tells none."""
        hidden = self.bound.last_hidden
        return None if hidden is None else hidden.reshape(self.num_rows, -1)[: self._state.num_live].clone()

    def takes(self, rows: StepRows) -> bool:
        """Whether what keeps the sequences is what the program writes and reads."""
        if not rows.kept.fits(self.bound.kept_layers, len(rows.input_ids)):
            return False
        if not self.is_of_one:
            return True
        names = self.bound.program.state_names
        return isinstance(rows.kept, GrowingCache) and self.bound.takes(rows.kept.states(names))

    def _step(self, rows: StepRows) -> torch.Tensor:
        num_live, state, table = len(rows.input_ids), self._state, self._runtime.resident_table
        if isinstance(rows.kept, GrowingCache):
            states = rows.kept.states(self.bound.program.state_names)
            assert states is not None, "a cache without states"
            self.bound.use_states(states)
        self._fill("input_ids", rows.input_ids.reshape(-1))
        self._fill("position_ids", rows.positions)
        self._lengths[:num_live] = rows.kept.lengths
        self._firsts[:num_live] = 0 if rows.firsts is None else rows.firsts.numpy()
        if self.bound.kept_layers:
            self._kept[:, :num_live] = rows.kept.table(self.bound.kept_layers)[:, :num_live]
        state.kept_format = rows.kept.record_format
        state.num_live, state.num_threads = num_live, torch.get_num_threads()
        is_plain = not any(experts.changes_routes for experts in self._experts)
        at = counted = 0  # instructions, and layers of experts, that are done
        results: dict[int, Any] = {}
        while True:
            with self._runtime.holding() as may_go_unasked:
                table.refresh()
                state.layers = ctypes.addressof(self._resident if may_go_unasked and is_plain else self._unknown)
                before = self._seconds[_EXPERTS]
                at = self.bound.code.run(at, state)
                reached = len(self._numbers) if at == DONE else bisect_left(self._numbers, at)
                if reached > counted:
                    spent = float(self._seconds[_EXPERTS] - before)
                    chosen = [index[:num_live] for index in self._index[counted:reached]]
                    table.count(self._layer_of[counted:reached], chosen, spent)
            if at == DONE:
                return self.bound.logits[:num_live]
            instruction, counted = self._body[at], reached
            if instruction.kind == "experts":
                self._run_layer(counted)
                counted += 1
            elif instruction.kind == "own":
                assert isinstance(rows.kept, GrowingCache), "checked by takes"
                call, tensors = instruction.attributes["call"], list(map(self.bound.tensor, instruction.inputs))
                made = call_module(
                    self.bound.modules[call.path], call, tensors, rows.kept, int(self._firsts[0]), results
                )
                self.bound.tensor(instruction.outputs[0]).copy_(made)
            else:
                self.bound.call(instruction)
            at += 1

    def _run_layer(self, place: int) -> None:
        """Let the runtime run one of the program's layers of experts."""
        live = slice(self._state.num_live)
        x, index, weights, out = (tensor[live] for tensor in self._tensors[place])
        layer = self._layer_of[place]
        self.bound.show_residual(layer, x)
        out.copy_(self._experts[layer].run(x, index, weights))

    def _fill(self, name: str, values: torch.Tensor) -> None:
        """Write an input of all rows; dead ones get what the first has, so that all they do is sound."""
        given = self.bound.inputs[name]
        given[: len(values)] = values
        given[len(values) :] = values[0]

    def _describe(self, experts: OffloadedExperts) -> StepLayer:
        """Describe a layer for the library; one that has other kernels stays Python's."""
        kernel = experts.kernel(self.bound.logits.dtype)
        if kernel is None:
            return StepLayer()
        self._kernels.append(kernel)
        addresses = self._runtime.resident_table.addresses[experts.layer].ctypes.data
        return StepLayer(kernel.pointers.ctypes.data, addresses, len(kernel.pointers), kernel.activation_bits)
