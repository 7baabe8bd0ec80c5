"""What another folder's experts cost, such as quantised ones: in predictions, in all and layer by layer.

All rows of text go through the model as one batch, so that each layer's experts are met once. Behind them lie copies:
one whose every layer runs the other folder's experts, and one for each layer, where that layer alone does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moeflow.checkpoint.float_source import float_sources
from moeflow.checkpoint.lossless_source import any_lossless
from moeflow.errors import UnsupportedModelError
from moeflow.hf import experts_interface
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.hf.model_folder import ModelFolder
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.options import LoadOptions
from moeflow.loading.tiers import Experts, build_runtime
from moeflow.memory_size import MemorySize
from moeflow.moe.choose_compute import computes_lossless
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime
from moeflow.progress import ProgressCallback
from moeflow.verify.reference import check_same_experts
from moeflow.verify.text import token_rows
from moeflow.verify.verify import layer_bytes, load_for_passes, run_rows

_SHOWN = 5  # layers that a report names


@dataclass(frozen=True)
class LayerCost:
    """What one layer's other experts cost where all other layers keep theirs.

    Args:
        layer: number among the MoE layers.
        path: of its experts module.
        divergence: mean KL divergence of the predictions, in nats a token.
        top1: share of the tokens whose likeliest next token stays.
    """

    layer: int
    path: str
    divergence: float
    top1: float


@dataclass(frozen=True)
class Cost:
    """What another folder's experts cost.

    Args:
        model: the folder whose predictions are the measure.
        against: the folder of the other experts.
        num_tokens: on which it was measured.
        divergence: mean KL divergence of the predictions with all of the other experts, in nats a token.
        top1: share of the tokens whose likeliest next token stays.
        layers: the same of each layer alone.
    """

    model: str
    against: str
    num_tokens: int
    divergence: float
    top1: float
    layers: list[LayerCost]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        worst = sorted(self.layers, key=lambda layer: -layer.divergence)[:_SHOWN]
        lines = [f"  layer {one.layer}: KL {one.divergence:.2g} nats, top-1 {one.top1:.1%}" for one in worst]
        head = (
            f"{self.against} against {self.model}: KL {self.divergence:.3g} nats a token, the likeliest token is the "
            f"same for {self.top1:.1%} of {self.num_tokens} tokens. Each layer alone, those that lose most:"
        )
        return "\n".join([head, *lines])


def measure_cost(
    model: str | Path,
    against: str | Path,
    *,
    text: str | list[list[int]] | None = None,
    num_tokens: int = 256,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    expert_memory: MemorySize | None = None,
    progress: ProgressCallback | None = None,
) -> Cost:
    """Measure what the experts of another folder change in a model's predictions, teacher-forced on one text.

    Args:
        model: a hub id or a folder; its dense weights are those of both sides.
        against: a folder of the same model, such as one that `moeflow quantize` wrote.
        text: to run, or rows of token ids; None takes the Python standard library's.
        num_tokens: of the text. Memory: the activations of (layers + 2) times as many in one layer.
        dtype: as of load_moe.
        device: likewise.
        expert_memory: likewise, of each side; None takes the bytes of one layer's experts.
        progress: called with (layers run, layers in all).

    Raises:
        ConfigError: no text, or a folder of another model.
        CheckpointError: a folder is damaged, or has no tokenizer.
        ExpertReadError: an expert cannot be read.
        UnsupportedModelError: the model has no head that predicts tokens.
    """
    folder, other = ModelFolder(model), ModelFolder(against)
    rows = token_rows(folder.path, text, num_tokens)
    loaded = load_for_passes(folder, dtype=dtype, device=device, expert_memory=expert_memory)
    if loaded.get_output_embeddings() is None:
        loaded.moeflow.close()
        raise UnsupportedModelError(f"{folder.path} predicts no tokens: what its experts cost cannot be told so.")
    with loaded.moeflow, _open_experts(other, loaded, expert_memory) as runtime:
        modules = experts_interface.experts_modules(loaded)
        other_experts = [OffloadedExperts(runtime, layer, module) for layer, (_, module) in enumerate(modules)]
        hooks = [
            module.register_forward_hook(_hook(layer, experts, len(modules), progress), with_kwargs=True)
            for layer, ((_, module), experts) in enumerate(zip(modules, other_experts, strict=True))
        ]
        final: list[torch.Tensor] = []
        hooks.append(loaded.base_model.register_forward_hook(lambda module, args, output: final.append(output[0])))
        try:
            run_rows(loaded, rows * (2 + len(modules)))
        finally:
            for hook in hooks:
                hook.remove()
        copies = _compare_predictions(loaded, final[0].unflatten(0, (2 + len(modules), len(rows))))
    layers = [LayerCost(layer, modules[layer][0], *one) for layer, one in enumerate(copies[1:])]
    return Cost(str(folder.path), str(other.path), sum(map(len, rows)), *copies[0], layers)


def _open_experts(folder: ModelFolder, model: Any, expert_memory: MemorySize | None) -> ExpertRuntime:
    """Open a folder's experts behind a runtime of their own, for a model that is loaded without them."""
    empty = folder.empty_model()
    check_same_experts(folder, empty, model)
    layers = folder.layers(empty)
    device = model.moeflow.device
    if any_lossless(layers) and not computes_lossless(device):
        layers = float_sources(layers)
    size = ExpertsSize.of(
        [source.layout for source in layers],
        experts_interface.num_experts_per_tok(empty),
        whole_slots=device.type != "cpu",
    )
    budget = layer_bytes(folder, empty) if expert_memory is None else expert_memory
    options = LoadOptions(device=device, expert_memory=budget)
    experts = Experts(folder.expert_files, folder.expert_stamps, layers, size)
    return build_runtime(experts, options, None, None, bytes_per_position=0)


def _hook(
    layer: int, experts: OffloadedExperts, num_layers: int, progress: ProgressCallback | None
) -> Callable[[ExpertsModule, tuple, dict, torch.Tensor], torch.Tensor]:
    """Return the hook of one layer: two copies get the output of the other experts on their own hidden states."""

    def replace(module: ExpertsModule, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
        routed = experts_interface.experts_arguments(args, kwargs)
        tokens = len(output) // (2 + num_layers)  # of a copy
        output = output.clone()
        for copy in (1, 2 + layer):
            part = slice(copy * tokens, (copy + 1) * tokens)
            output[part] = experts.run(*(value[part] for value in routed))
        if progress is not None:
            progress(layer + 1, num_layers)
        return output

    return replace


@torch.no_grad()
def _compare_predictions(model: Any, hidden_states: torch.Tensor) -> list[tuple[float, float]]:
    """Return (mean KL divergence, top-1 agreement) of every copy [1 + L, rows, S, H] with the first."""
    head = model.get_output_embeddings()
    divergences, agreements = torch.zeros(2, len(hidden_states) - 1, dtype=torch.float64)
    num_rows = hidden_states.shape[1]
    for row in range(num_rows):
        exact = head(hidden_states[0, row]).float().log_softmax(-1)
        for copy in range(1, len(hidden_states)):
            found = head(hidden_states[copy, row]).float().log_softmax(-1)
            divergences[copy - 1] += (exact.exp() * (exact - found)).sum(-1).double().mean().item()
            agreements[copy - 1] += (exact.argmax(-1) == found.argmax(-1)).double().mean().item()
    means = (divergences / num_rows).clamp(min=0).tolist(), (agreements / num_rows).tolist()
    return list(zip(*means, strict=True))
