"""The function behind transformers' experts interface: route tokens to experts that may not be here yet.

The order in which experts arrive never shows in the result: each token's K outputs are written apart, then summed.
"""

import weakref
from contextlib import closing

import torch

from moeflow.errors import ConfigError
from moeflow.kernels.expert_mlp import combine, expert_mlp
from moeflow.prediction_loop import Routes
from moeflow.residual import ResidualTap
from moeflow.runtime import ExpertRuntime

_BY_HANDLE: "weakref.WeakValueDictionary[int, OffloadedExperts]" = weakref.WeakValueDictionary()


class OffloadedExperts:
    """The routed experts of one layer, served from the runtime's tiers.

    Args:
        runtime: where experts come from.
        layer: number among the MoE layers.
        module: the experts module, whose parameters were taken off.
        tap: where the residual stream is seen, for a predictor that asks for it.
    """

    def __init__(self, runtime: ExpertRuntime, layer: int, module: torch.nn.Module, tap: ResidualTap | None = None):
        self.runtime = runtime
        self.tap = tap
        self.layer = layer
        self._num_experts = runtime.store.layers[layer].layout.num_experts
        self._module = weakref.ref(module)  # the module holds this object, not the other way round
        self._handle = id(self)
        _BY_HANDLE[self._handle] = self

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
            ConfigError: the hidden states are on another device than the experts.
        """
        if torch.compiler.is_compiling():
            return torch.ops.moeflow.experts(hidden_states, top_k_index, top_k_weights, self._handle)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return _NoBackward.apply(hidden_states, top_k_index, top_k_weights, self)
        return self.run(hidden_states, top_k_index, top_k_weights)

    @torch.no_grad()
    def run(self, hidden_states, top_k_index, top_k_weights):
        """Do the work of a call, outside autograd and compilation."""
        if hidden_states.device != self.runtime.device:
            raise ConfigError(
                f"the model's activations are on {hidden_states.device}, its experts on "
                f"{self.runtime.device}. Do not move a "
                "model that load_moe returned: give load_moe the device instead."
            )
        num_tokens, top_k = top_k_index.shape
        if num_tokens == 0:
            return torch.zeros_like(hidden_states)
        if self.runtime.recorder is not None:
            self.runtime.recorder.observe(self.layer, top_k_index, top_k_weights, hidden_states)
        routes = None
        if self.runtime.predicting:
            residual = self.tap.residual(self.layer, hidden_states) if self.tap is not None else None
            routes = Routes(top_k_index, top_k_weights, residual)
        if num_tokens == 1:
            outputs = self._one_token(hidden_states, top_k_index, routes)
        else:
            outputs = self._many_tokens(hidden_states, top_k_index, routes)
        return combine(outputs.view(num_tokens, top_k, -1), top_k_weights)

    def _one_token(self, hidden_states, top_k_index, routes):
        """Compute one token's K experts. Returns [K, H]."""
        experts = top_k_index[0].tolist()
        outputs = [None] * len(experts)
        with closing(self.runtime.serve(self.layer, self._distinct(experts), routes)) as served:
            for expert, weights in served:
                outputs[experts.index(expert)] = self._mlp(hidden_states, weights)
        if any(output is None for output in outputs):  # experts that stand for none, or (never seen) one expert twice
            zero = torch.zeros_like(hidden_states)
            outputs = [outputs[experts.index(e)] if e < self._num_experts else zero for e in experts]
        return torch.cat(outputs)

    def _many_tokens(self, hidden_states, top_k_index, routes):
        """Compute every expert once, on all its tokens. Returns [T * K, H]."""
        num_tokens, top_k = top_k_index.shape
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)  # places in [T * K], grouped by expert, tokens in order
        counts = torch.bincount(flat, minlength=self._num_experts).tolist()
        starts, start = {}, 0
        for expert, count in enumerate(counts):
            if count and expert < self._num_experts:
                starts[expert] = start
            start += count
        outputs = hidden_states.new_zeros(num_tokens * top_k, hidden_states.shape[-1])
        num_tokens_of = [counts[expert] for expert in starts]
        with closing(self.runtime.serve(self.layer, list(starts), routes, num_tokens_of)) as served:
            for expert, weights in served:
                places = order[starts[expert] : starts[expert] + counts[expert]]
                outputs[places] = self._mlp(hidden_states[places // top_k], weights)
        return outputs

    def _distinct(self, experts):
        return [expert for expert in dict.fromkeys(experts) if expert < self._num_experts]

    def _mlp(self, hidden_states, weights):
        """Run one expert on [n, H] tokens where its weights are. Returns [n, H] where the tokens are."""
        module = self._module()
        place = weights["down_proj"].device
        output = expert_mlp(
            hidden_states.to(place),
            weights,
            activation=module._apply_gate if module.has_gate else module.act_fn,
            is_transposed=module.is_transposed,
        ).to(hidden_states.device)
        # The norm's own weight stays on the device.
        return module.post_expert_norm(output) if getattr(module, "has_post_expert_norm", False) else output


class _NoBackward(torch.autograd.Function):
    """Marks the experts' output as part of the graph and says clearly that it has no gradient."""

    @staticmethod
    def forward(ctx, hidden_states, top_k_index, top_k_weights, experts):
        return experts.run(hidden_states, top_k_index, top_k_weights)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "moeflow's offloaded experts have no backward pass: their weights are not in memory at "
            "once. Load the model with "
            "AutoModelForCausalLM.from_pretrained to train it."
        )


@torch.library.custom_op("moeflow::experts", mutates_args=())
def _experts_op(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, handle: int
) -> torch.Tensor:
    return _BY_HANDLE[handle].run(hidden_states, top_k_index, top_k_weights)


@_experts_op.register_fake
def _(hidden_states, top_k_index, top_k_weights, handle):
    return torch.empty_like(hidden_states)
