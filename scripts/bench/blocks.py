"""What bench_kernels walks through: all layers' experts, by transformers' functions and by moeflow's kernels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench.matrices import ACTIVATION_BITS, BFLOAT16_BOUND, TORCH_BOUND, activations, check
from bench.rounds import Case
from moeflow.core import PAGE_BYTES, ExpertKey, MatrixSpec, RecordLayout, align_up
from moeflow.kernels.activations import Activation
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import FORMATS
from moeflow.kernels.quantization.quantize import quantize
from moeflow.moe.cpu_compute import CpuCompute
from moeflow.moe.dispatch import Dispatch

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
MOST_GATHERED_BYTES = 1 << 28  # batched_mm copies the matrices of every (token, expert) pair
ACTIVATION_OF_MIXTRAL = Activation("silu", "concatenated")


class Size(NamedTuple):
    """Of the experts of a Mixtral."""

    num_layers: int = 30
    num_experts: int = 16
    num_features: int = 576
    intermediate: int = 768
    top_k: int = 2

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The two matrices of an expert."""
        return {
            "gate_up_proj": (2 * self.intermediate, self.num_features),
            "down_proj": (self.num_features, self.intermediate),
        }


class Slot(NamedTuple):
    """An expert in memory, as far as the compute core asks."""

    expert: int
    record: RecordLayout
    address: int


class Block:
    """The experts of all layers in one format.

    Args:
        name: of the format.
        size: of the model.
        weights: [num_experts], each expert's matrices by name: those of every layer.
    """

    def __init__(self, name: str, size: Size, weights: list[dict[str, torch.Tensor]]):
        self.name, self.size, self.spec = name, size, FORMATS[name]
        tensors = [tensor for key, shape in size.shapes.items() for tensor in self.spec.tensors(key, shape)]
        is_float = self.spec.kind == "float"
        matrices = () if is_float else tuple(MatrixSpec(key, name, shape) for key, shape in size.shapes.items())
        self.record = RecordLayout.pack(tensors, matrices)
        stride = align_up(self.record.num_bytes, PAGE_BYTES)
        self.arena = torch.empty(size.num_layers, size.num_experts, stride, dtype=torch.uint8)
        for expert, found in enumerate(weights):
            views = self._views(self.arena[0, expert])
            for key, weight in found.items():
                for part, tensor in quantize(weight, self.spec, name=key).items():
                    views[part].copy_(tensor)
        for layer in self.arena[1:]:
            layer.copy_(self.arena[0])
        self.slots = [
            [Slot(expert, self.record, record.data_ptr()) for expert, record in enumerate(layer)]
            for layer in self.arena
        ]
        self.compute = CpuCompute(ACTIVATION_OF_MIXTRAL, is_transposed=False, activation_bits=ACTIVATION_BITS)
        assert self.compute.can_run([self.record]), f"no kernel for {name}"

    def read_model(self, folder: Path) -> None:
        """Overwrite all layers with those of a checkpoint in this very layout."""
        from moeflow.checkpoint.headers import open_checkpoint
        from moeflow.checkpoint.store import ExpertStore
        from moeflow.hf.expert_sources import map_experts
        from moeflow.hf.files.config import load_config
        from moeflow.hf.pretrained import empty_model

        checkpoint = open_checkpoint(folder)
        layers = map_experts(empty_model(load_config(folder), torch.bfloat16), checkpoint.tensors)
        if layers[0].layout.record != self.record:
            raise SystemExit(f"{folder}: its experts are not plain bfloat16 matrices as a Mixtral has them")
        store = ExpertStore(checkpoint.files, layers)
        for layer in range(self.size.num_layers):
            for expert in range(self.size.num_experts):
                record: np.ndarray = self.arena[layer, expert].numpy()
                store.read(ExpertKey(layer, expert), record)
        store.close()

    def weights(self, layer: int = 0) -> list[dict[str, torch.Tensor]]:
        """Return the matrices of one layer's experts in float32."""
        return [self._matrices(record, torch.float32) for record in self.arena[layer]]

    def modules(self) -> list[torch.nn.Module]:
        """Return transformers' own experts modules, one a layer, over the same memory; bfloat16 only."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        size = self.size
        config = MixtralConfig(
            hidden_size=size.num_features,
            intermediate_size=size.intermediate,
            num_local_experts=size.num_experts,
            num_experts_per_tok=size.top_k,
        )
        modules = []
        for layer in self.arena:
            with torch.device("meta"):
                module = MixtralExperts(config)
            module.config = config
            for name, view in self._views(layer).items():
                setattr(module, name, torch.nn.Parameter(view, requires_grad=False))
            modules.append(module)
        return modules

    def run(self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Run one layer the way the runtime does when every expert is here, grouping included."""
        slots, compute = self.slots[layer], self.compute
        dispatch = Dispatch(index, self.size.num_experts)
        residents = [slots[expert] for expert in dispatch.experts]
        if dispatch.num_tokens == 1:
            return compute.run_token(x, residents, dispatch, weights)
        outputs = compute.allocate_outputs(x, dispatch)
        compute.run(x, residents, dispatch, outputs)
        return compute.combine(x, outputs, weights)

    def check(self, num_tokens: int) -> float:
        """Return the error of one layer against float64.

        Raises:
            WrongResult: it is above the bound.
        """
        x, routes = activations(num_tokens, self.size.num_features, torch.bfloat16), Routes(self.size, num_tokens, 1)
        expected = self._expected(x, *routes.chosen[0][0])
        return check(self.run(0, x, *routes.chosen[0][0]), expected, BFLOAT16_BOUND, f"experts in {self.name}")

    def check_module(self, module: torch.nn.Module, num_tokens: int) -> None:
        """See that transformers' module computes the same."""
        x, routes = activations(num_tokens, self.size.num_features, torch.bfloat16), Routes(self.size, num_tokens, 1)
        expected = self._expected(x, *routes.chosen[0][0])
        check(module(x, *routes.chosen[0][0]), expected, TORCH_BOUND, module.config._experts_implementation)

    def case(self, name: str, num_tokens: int, routes: "Routes") -> Case:
        """Return the walk of tokens through all layers by moeflow's kernels."""
        x = activations(num_tokens, self.size.num_features, torch.bfloat16)

        def run():
            for walk in routes.chosen:
                for layer, (index, weights) in enumerate(walk):
                    self.run(layer, x, index, weights)

        return Case(name, run, routes.num_experts * self.record.num_bytes, len(routes.chosen))

    def _matrices(self, record, dtype):
        views = self._views(record)
        return {name: dequantize(views, name, self.spec, shape, dtype) for name, shape in self.size.shapes.items()}

    def _expected(self, x, index, weights):
        matrices = [self._matrices(record, torch.float64) for record in self.arena[0]]
        total = torch.zeros(x.shape, dtype=torch.float64)
        for token, (experts, factors) in enumerate(zip(index.tolist(), weights.double(), strict=True)):
            for expert, factor in zip(experts, factors, strict=True):
                inner = ACTIVATION_OF_MIXTRAL.apply(x[token : token + 1].double() @ matrices[expert]["gate_up_proj"].T)
                total[token] += factor * (inner @ matrices[expert]["down_proj"].T)[0]
        return total

    def _views(self, record):
        """Return the tensors in a record, or in a stack of them."""
        leading = record.shape[:-1]
        return {
            spec.name: record[..., spec.offset : spec.offset + spec.num_bytes]
            .view(DTYPES[spec.dtype])
            .view(*leading, *spec.shape)
            for spec in self.record.tensors
        }


class Routes:
    """Random routes: [walks][num_layers] of (top_k_index [T, K], top_k_weights [T, K]).

    Args:
        size: of the model.
        num_tokens: T.
        walks: through all layers, each with routes of its own, so that weights come from memory.
    """

    def __init__(self, size: Size, num_tokens: int, walks: int):
        generator = torch.Generator().manual_seed(2)
        self.chosen = []
        for _ in range(walks):
            logits = torch.randn(size.num_layers, num_tokens, size.num_experts, generator=generator)
            weights, index = logits.softmax(-1).topk(size.top_k)
            weights = weights / weights.sum(-1, keepdim=True)
            self.chosen.append(list(zip(index, weights, strict=True)))
        self.num_experts = sum(len(index.unique()) for walk in self.chosen for index, _ in walk)


def transformers_case(block: Block, modules: list[torch.nn.Module], name: str, num_tokens: int, routes: Routes) -> Case:
    """Return the same walk by one of transformers' implementations."""
    x = activations(num_tokens, block.size.num_features, torch.bfloat16)

    def run():
        for module in modules:
            module.config._experts_implementation = name
        for walk in routes.chosen:
            for module, (index, weights) in zip(modules, walk, strict=True):
                module(x, index, weights)

    return Case(name, run, routes.num_experts * block.record.num_bytes, len(routes.chosen))


def implementations(block: Block, num_tokens: int) -> tuple[str, ...]:
    """Return transformers' implementations that can run so many tokens in bounded memory."""
    gathered = num_tokens * block.size.top_k * block.record.num_bytes
    return IMPLEMENTATIONS if gathered <= MOST_GATHERED_BYTES else IMPLEMENTATIONS[:-1]
