"""The function behind transformers' experts interface: one layer's routed experts, fetched as tokens need them."""

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from moeflow.errors import ConfigError
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.kernels.cpu.layer import LayerKernel
from moeflow.moe.choose_compute import choose_compute
from moeflow.moe.compute import ExpertCompute
from moeflow.moe.cpu_compute import CpuCompute
from moeflow.moe.dispatch import Dispatch
from moeflow.moe.packed_routes import HostRoutes, PackedRoutes, routes_on_host
from moeflow.moe.split_compute import SplitCompute
from moeflow.moe.triton_compute import TritonCompute
from moeflow.offload.prediction_loop import RouterOutput
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.trusting.early_launch import launch_early
from moeflow.offload.trusting.step_pieces import RunExperts
from moeflow.offload.trusting.trusted_step import NotTrustedError

# (hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K], num_experts=E) -> top_k_index, top_k_weights
BeforeStep = Callable[..., tuple[torch.Tensor, torch.Tensor]]
# (hidden_states [T, H], top_k_index [T, K], dtype of the outputs) -> outputs of every place [T * K, H]
OutputsOf = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]

_BY_HANDLE: "weakref.WeakValueDictionary[int, OffloadedExperts]" = weakref.WeakValueDictionary()


class OffloadedExperts:
    """The routed experts of one layer, fetched from the runtime's tiers.

    Args:
        runtime: where experts come from.
        layer: number among the MoE layers.
        module: the experts module, whose parameters were taken off.
    """

    def __init__(self, runtime: ExpertRuntime, layer: int, module: ExpertsModule) -> None:
        self.runtime = runtime
        self.layer = layer
        self._before: Sequence[BeforeStep] = ()
        self._outputs_of: OutputsOf | None = None
        self._num_experts = runtime.experts_per_layer[layer]
        self._module = weakref.ref(module)  # the module holds this object
        self._computes: dict[torch.dtype, ExpertCompute] = {}
        self._kernels: dict[torch.dtype, LayerKernel | None] = {}
        self._handle = id(self)
        _BY_HANDLE[self._handle] = self

    def use(self, *, before: Sequence[BeforeStep] = (), outputs_of: OutputsOf | None = None) -> None:
        """Change what this layer does from the next call on; what is left out stays as it is.

        Args:
            before: steps that change the routes before anything else sees them, such as pruning, in this order.
            outputs_of: returns the outputs of every place where several processes compute them, see `ExpertParallel`.
        """
        self._before = before or self._before
        self._outputs_of = outputs_of or self._outputs_of

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the routed experts.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K], expert numbers; a number of num_experts or more means none.
            top_k_weights: [T, K].

        Returns:
            [T, H].

        Raises:
            ExpertReadError: an expert could not be read.
            ClosedModelError: the runtime was closed.
            ConfigError: the hidden states are on another device than the experts, or the experts are spread over
                processes and no session is open.
            ParallelError: another process failed.
        """
        if torch.compiler.is_compiling():
            return torch.ops.moeflow.experts(hidden_states, top_k_index, top_k_weights, self._handle)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return _NoBackward.apply(hidden_states, top_k_index, top_k_weights, self)
        return self.run(hidden_states, top_k_index, top_k_weights)

    @torch.no_grad()
    def run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Run the routed experts, outside autograd and compilation; arguments as for a call."""
        if hidden_states.device != self.runtime.device:
            raise ConfigError(
                f"the model's activations are on {hidden_states.device}, its experts on "
                f"{self.runtime.device}. Do not move a "
                "model that load_moe returned: give load_moe the device instead."
            )
        if top_k_index.numel() == 0:
            return torch.zeros_like(hidden_states)
        trusting = self.runtime.trusting
        if trusting is not None and trusting.pieces is not None and trusting.pieces.cutting is not None:
            routed = hidden_states, top_k_index, top_k_weights
            return trusting.pieces.cutting.add(self.layer, self._behind_a_piece, routed)
        for step in self._before:
            top_k_index, top_k_weights = step(hidden_states, top_k_index, top_k_weights, num_experts=self._num_experts)
        for observer in self.runtime.observers:
            observer.observe(self.layer, top_k_index, top_k_weights, hidden_states)
        if self._outputs_of is not None:
            spread = self._outputs_of(hidden_states, top_k_index, self.outputs_dtype(hidden_states.dtype))
            return self.compute(hidden_states.dtype).combine(hidden_states, spread, top_k_weights)
        num_tokens, most = len(hidden_states), self.runtime.most_tokens
        if most is None or num_tokens <= most:
            return self._run(hidden_states, top_k_index, top_k_weights, num_tokens)
        parts = zip(hidden_states.split(most), top_k_index.split(most), top_k_weights.split(most), strict=True)
        return torch.cat([self._run(*part, num_tokens) for part in parts])

    def _behind_a_piece(self) -> RunExperts:
        """Return what runs this layer in replays of the step that is captured, with what its hooks saw of the layer."""
        prediction = self.runtime.prediction
        show = None if prediction is None else prediction.taken(self.layer)
        if show is None:
            return self.run

        def run(*routed: torch.Tensor) -> torch.Tensor:
            show()
            return self.run(*routed)

        return run

    def _run(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, call_tokens: int
    ) -> torch.Tensor:
        """Run tokens of a call of `call_tokens`: [T, H]. The bits depend on those, and not on T."""
        compute, trusting = self.compute(hidden_states.dtype), self.runtime.trusting
        look_up = None  # runs the layer at once where its experts are resident, by kernels that find them
        on_device = compute.device if isinstance(compute, SplitCompute) else compute
        if trusting is not None and isinstance(on_device, TritonCompute) and on_device.can_look_up(call_tokens):
            look_up = partial(on_device.look_up, hidden_states, top_k_index, top_k_weights, trusting.table, self.layer)
        if trusting is not None and trusting.step is not None:
            if look_up is None:
                raise NotTrustedError
            trusting.step.add(self.layer, top_k_index)
            return look_up()
        prediction = self.runtime.prediction if self.runtime.predicting else None
        wanted = None if prediction is None else top_k_weights
        if wanted is None and (whole := self._run_whole(hidden_states, top_k_index, top_k_weights)) is not None:
            return whole
        output: torch.Tensor | None = None
        if look_up is not None:
            signal = None if prediction is None else prediction.signal(self.layer, hidden_states)
            routes, router_output, output = self._run_early(look_up, PackedRoutes(top_k_index, wanted, signal))
        else:
            routes = routes_on_host(top_k_index, wanted)
            router_output = _router_output(routes, hidden_states)
        if output is not None and routes.top_k_index.min() >= 0:
            return output
        dispatch = Dispatch(torch.from_numpy(routes.top_k_index), self._num_experts, call_tokens)
        outputs: torch.Tensor | None = None
        counts, together = dispatch.num_tokens_of(), look_up is not None
        on_host = compute.tokens_on_host(hidden_states) if isinstance(compute, SplitCompute) else None
        fetched = self.runtime.fetch(self.layer, dispatch.experts, router_output, counts, on_host, together=together)
        with closing(fetched):
            for residents in fetched:
                if look_up is not None and len(residents) == len(dispatch.experts) and not residents[0].on_host:
                    assert trusting is not None
                    trusting.table.refresh()
                    output = look_up()
                    continue
                if call_tokens == 1 and len(residents) == dispatch.top_k:
                    output = compute.run_token(hidden_states, residents, dispatch, top_k_weights)
                    continue
                if outputs is None:
                    outputs = compute.allocate_outputs(hidden_states, dispatch)
                compute.run(hidden_states, residents, dispatch, outputs)
        if output is not None:
            return output
        if outputs is None:  # no expert at all
            outputs = compute.allocate_outputs(hidden_states, dispatch)
        return compute.combine(hidden_states, outputs, top_k_weights)

    def _run_early(
        self, look_up: Callable[[], torch.Tensor], packed: PackedRoutes
    ) -> tuple[HostRoutes, RouterOutput | None, torch.Tensor | None]:
        """Launch the layer before its routes are known here; return them and, where nothing was missed, its output."""
        runtime = self.runtime
        assert runtime.trusting is not None
        with runtime.changing() as residency:
            early = launch_early(
                self.layer, look_up, packed.tensor, packed.shape,
                table=runtime.trusting.table, residency=residency, downloads=runtime.downloads,
            )  # fmt: skip
            routes = packed.unpack(early.values)
            router_output = _router_output(routes, None)
            if early.output is not None:
                runtime.expert_fetch.found(self.layer, early.experts, router_output)
        return routes, router_output, early.output

    def _run_whole(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Run the layer in one call of the compiled library; None where it has no kernels, or an expert is missing."""
        kernel = self.kernel(hidden_states.dtype)
        if kernel is None:
            return None
        table = self.runtime.resident_table
        with self.runtime.holding():
            table.refresh()
            addresses = table.addresses[self.layer, : self._num_experts]
            if len(top_k_index) == 1 and not _hold(addresses, top_k_index):
                return None  # told here for less than the call would take
            begin = time.perf_counter()
            found = kernel.run(hidden_states, top_k_index, top_k_weights, addresses)
            if found is None:
                return None
            table.count_layer(self.layer, found.experts, time.perf_counter() - begin)
        return found.hidden_states

    @torch.no_grad()
    def run_rows(
        self, hidden_states: torch.Tensor, experts: torch.Tensor, call_tokens: int | None = None
    ) -> torch.Tensor:
        """Run each row through one expert, with the bits that a whole call has before it weighs and sums.

        Args:
            hidden_states: [n, H].
            experts: [n], each row's expert, on the CPU.
            call_tokens: tokens of the whole call that the rows are of; n if None.

        Returns:
            [n, H] of `outputs_dtype`.

        Raises:
            ExpertReadError: an expert could not be read.
            ClosedModelError: the runtime was closed.
        """
        dispatch = Dispatch(experts.unsqueeze(1), self._num_experts, call_tokens)
        compute = self.compute(hidden_states.dtype)
        outputs = compute.allocate_outputs(hidden_states, dispatch)
        fetched = self.runtime.fetch(self.layer, dispatch.experts, None, dispatch.num_tokens_of())
        with closing(fetched):
            for residents in fetched:
                compute.run(hidden_states, residents, dispatch, outputs)
        return outputs

    def outputs_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of experts' outputs until they are summed, for hidden states of `dtype`."""
        no_routes = torch.empty(0, 1, dtype=torch.int64)
        empty = torch.empty(0, 1, dtype=dtype, device=self.runtime.device)
        return self.compute(dtype).allocate_outputs(empty, Dispatch(no_routes, self._num_experts)).dtype

    @property
    def changes_routes(self) -> bool:
        """Whether a call does more than to run the experts that it is given: pruning, or other processes' experts."""
        return bool(self._before) or self._outputs_of is not None

    def kernel(self, dtype: torch.dtype) -> LayerKernel | None:
        """Return what runs the whole layer in one call, for hidden states of a dtype; None without compiled kernels."""
        if dtype not in self._kernels:
            compute, records = self.compute(dtype), self.runtime.records(self.layer)
            self._kernels[dtype] = compute.layer(records) if isinstance(compute, CpuCompute) else None
        return self._kernels[dtype]

    def compute(self, dtype: torch.dtype) -> ExpertCompute:
        """Return what computes experts for hidden states of a dtype."""
        found = self._computes.get(dtype)
        if found is None:
            records = self.runtime.records(self.layer)
            module = self._module()
            assert module is not None, "the module of these experts is gone"
            runtime = self.runtime
            found = self._computes[dtype] = choose_compute(
                module,
                records,
                runtime.device,
                dtype,
                downloads=runtime.downloads if runtime.computes_on_host else None,
            )
        return found


def _router_output(routes: HostRoutes, hidden_states: torch.Tensor | None) -> RouterOutput | None:
    """Return what a predictor takes in; None where none wants the routes."""
    index, weights, signal = routes
    return None if weights is None else RouterOutput(index, weights, hidden_states, signal)


def _hold(addresses: np.ndarray, top_k_index: torch.Tensor) -> bool:
    """Whether all experts of one token [1, K] are in memory; addresses: [E], 0 where one is not."""
    num_experts = len(addresses)
    return all(expert >= num_experts or addresses[expert] for expert in top_k_index[0].tolist())


class _NoBackward(torch.autograd.Function):
    """Marks the experts' output as part of the graph and says clearly that it has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        experts: OffloadedExperts,
    ) -> torch.Tensor:
        return experts.run(hidden_states, top_k_index, top_k_weights)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise RuntimeError(
            "moeflow's offloaded experts have no backward pass: their weights are not in memory at "
            "once. Load the model with "
            "AutoModelForCausalLM.from_pretrained to train it."
        )


def layer_of_handle(handle: int) -> int:
    """Return the number among the MoE layers of the experts behind a node of a captured graph."""
    return _BY_HANDLE[handle].layer


def _experts_op(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, handle: int
) -> torch.Tensor:
    return _BY_HANDLE[handle].run(hidden_states, top_k_index, top_k_weights)


# By hand, since torch.library.custom_op's own Python takes longer a call than the experts of a small model.
_LIBRARY = torch.library.Library("moeflow", "FRAGMENT")
_LIBRARY.define("experts(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, int handle) -> Tensor")
_LIBRARY.impl("experts", _experts_op, "CompositeExplicitAutograd")


@torch.library.register_fake("moeflow::experts")
def _(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, handle: int) -> torch.Tensor:
    return torch.empty_like(hidden_states)
