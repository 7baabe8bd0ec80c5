"""Measures the error that each weight format causes in each expert, in one pass over calibration text.

All windows of text go through the model as one batch, so that a layer's experts are met once, with every token that is
routed to them; each is quantised, compared and forgotten before the next layer. Behind the windows lie L copies of the
first few: in copies l, and there alone, layer l's output gets the error of its experts in one format, and the final
predictions of those copies tell how sensitive the model is to an error in that layer. No gradient, no second pass.

Knows models and formats. Knows nothing of budgets.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moeflow.calibration.expert_statistics import ExpertStatistics
from moeflow.checkpoint.float_source import parameters_of
from moeflow.checkpoint.lossless_source import any_lossless
from moeflow.core import PAGE_BYTES, ExpertKey, align_up
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.hf.passes.residual import ResidualTap
from moeflow.kernels.expert_mlp import expert_mlp
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import WeightFormat, find_format
from moeflow.kernels.quantization.quantize import quantize
from moeflow.progress import ProgressCallback

_MAX_TOKENS_OF_EXPERT = 256  # that its error is measured on, besides those of the copied windows
_PROBE_BITS = 3  # layers are probed with the error of this width, where it is among the formats
_MIN_SQUARE = 1e-12


@torch.no_grad()
def measure_experts(
    model: PreTrainedModel,
    windows: list[list[int]],
    formats: list[str],
    *,
    method: str = "hqq",
    num_probes: int = 4,
    progress: ProgressCallback | None = None,
) -> ExpertStatistics:
    """Run a model over text and measure every expert in every format.

    Args:
        model: from load_moe or from_pretrained, its experts unquantised. On a CPU float32 is several times as fast as
            bfloat16.
        windows: token ids of pieces of text, all of one length. Memory: the activations of (windows + layers x probes)
            x length tokens of one layer.
        formats: names of formats, from the smallest to the largest.
        method: how experts will be quantised: "rtn" or "hqq"; "gptq" is measured as "hqq", which needs no data.
        num_probes: windows, the first ones, on which each layer's sensitivity is measured; at most all are taken.
        progress: called with (experts measured, experts in all).

    Raises:
        ConfigError: no windows, windows of different lengths, or experts that are quantised already.
    """
    lengths = {len(window) for window in windows}
    if len(lengths) != 1 or 0 in lengths:
        raise ConfigError(
            f"calibration windows are {sorted(lengths)} tokens long. Give at least one window, all of one length."
        )
    specs = [find_format(name) for name in formats]
    modules = [module for _, module in experts_interface.experts_modules(model)]
    shape, probes = (len(windows), lengths.pop()), windows[:num_probes]
    survey = _Survey(model, specs, "hqq" if method == "gptq" else method, shape, len(probes), progress)
    handles = [
        module.register_forward_hook(survey.hook(layer), with_kwargs=True) for layer, module in enumerate(modules)
    ]
    final: list[torch.Tensor] = []
    handles.append(_base(model).register_forward_hook(lambda module, args, output: final.append(output[0])))
    device = next(model.parameters()).device
    rows = torch.tensor([*windows, *probes * len(modules)], device=device)
    survey.tap.listen(True)
    try:
        model(input_ids=rows, use_cache=False, logits_to_keep=1)
    finally:
        survey.tap.close()
        for handle in handles:
            handle.remove()
    return survey.statistics(_divergences(model, final[0], len(windows), len(probes)))


class _Survey:
    """Hooks of all layers: measure a layer's experts on the tokens that pass, and disturb its copies.

    Args:
        model: to measure.
        specs: the formats.
        method: of quantisation.
        shape: (windows, tokens of each).
        num_probes: windows that are copied for each layer.
        progress: called with (experts measured, experts in all).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        specs: list[WeightFormat],
        method: str,
        shape: tuple[int, int],
        num_probes: int,
        progress: ProgressCallback | None,
    ) -> None:
        self.tap = ResidualTap(model)
        self._specs, self._method, self._progress = specs, method, progress
        self._num_tokens, self._probed, self._num_probes = shape[0] * shape[1], num_probes * shape[1], num_probes
        self._probe = next((j for j, spec in enumerate(specs) if spec.bits == _PROBE_BITS), len(specs) // 2)
        self._weights = [
            _reader(model, layer, module) for layer, (_, module) in enumerate(experts_interface.experts_modules(model))
        ]
        self._layers: list[dict[str, np.ndarray]] = [{} for _ in self._weights]
        self._done = 0

    def hook(self, layer: int) -> Callable[[ExpertsModule, tuple, dict, torch.Tensor], torch.Tensor]:
        """Return the forward hook of one layer's experts."""

        def measure(module: ExpertsModule, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
            hidden_states, index, weights = experts_interface.experts_arguments(args, kwargs)
            return self._measure(layer, module, hidden_states, index, weights, output)

        return measure

    def _measure(
        self,
        layer: int,
        module: ExpertsModule,
        hidden_states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Measure one layer's experts on their tokens; return the output with the error of its copies."""
        clean = slice(0, self._num_tokens)
        residual = self.tap.residual(layer, hidden_states)
        stream = output[clean] if residual is None else residual[clean] + output[clean]
        square = stream.float().square().sum(-1).clamp(min=_MIN_SQUARE)  # [T]
        num_experts = module.num_experts
        found = self._layers[layer]
        found["routed"] = np.zeros(num_experts, np.int64)
        found["mean_weight"] = np.zeros(num_experts)
        found["error"] = np.zeros((num_experts, len(self._specs)))
        disturbance = hidden_states.new_zeros(self._probed, hidden_states.shape[-1], dtype=torch.float32)
        for expert in range(num_experts):
            tokens, ranks = (index[clean] == expert).nonzero(as_tuple=True)
            found["routed"][expert] = len(tokens)
            if len(tokens):
                found["mean_weight"][expert] = weights[tokens, ranks].double().mean().item()
                chosen = _sample(tokens, self._probed)
                tokens, ranks = tokens[chosen], ranks[chosen]
                inputs, scale = hidden_states[tokens], weights[tokens, ranks].float()[:, None]
                probed = tokens < self._probed
                for j, error in enumerate(self._errors(layer, expert, module, inputs)):
                    error = error * scale
                    found["error"][expert, j] = (error.square().sum(-1) / square[tokens]).double().mean().item()
                    if j == self._probe:
                        disturbance.index_add_(0, tokens[probed], error[probed])
            self._report(num_experts)
        relative = disturbance.square().sum(-1) / square[: self._probed]
        found["disturbance"] = relative.double().view(self._num_probes, -1).mean(1).cpu().numpy()
        begin = self._num_tokens + layer * self._probed
        output = output.clone()
        output[begin : begin + self._probed] += disturbance.to(output.dtype)
        return output

    def _errors(self, layer: int, expert: int, module: ExpertsModule, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield for each format the error of an expert's output, [n, H] float32."""
        exact_weights = {name: value.to(inputs.dtype) for name, value in self._weights[layer](expert).items()}
        exact = _run(module, inputs, exact_weights)
        for spec in self._specs:
            rounded = {
                name: _rounded(value, spec, self._method, module.is_transposed, name) if value.dim() == 2 else value
                for name, value in exact_weights.items()
            }
            yield (_run(module, inputs, rounded) - exact).float()

    def _report(self, num_experts: int) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, num_experts * len(self._weights))

    def statistics(self, divergence: np.ndarray) -> ExpertStatistics:
        """Return the figures of all layers, with the divergence of each layer's copies [L, P]."""
        layers = self._layers
        most = max(len(layer["routed"]) for layer in layers)

        def stacked(name: str) -> np.ndarray:
            return np.stack(
                [np.pad(v, [(0, most - len(v))] + [(0, 0)] * (v.ndim - 1)) for v in (layer[name] for layer in layers)]
            )

        return ExpertStatistics(
            formats=tuple(spec.name for spec in self._specs),
            num_experts=tuple(len(layer["routed"]) for layer in layers),
            num_bytes=np.array([[_bytes(reader(0), spec) for spec in self._specs] for reader in self._weights]),
            num_tokens=self._num_tokens,
            routed=stacked("routed"),
            mean_weight=stacked("mean_weight"),
            error=stacked("error"),
            divergence=divergence,
            disturbance=np.stack([layer["disturbance"] for layer in layers]),
        )


def _base(model: PreTrainedModel) -> torch.nn.Module:
    return getattr(model, model.base_model_prefix)


def _reader(model: PreTrainedModel, layer: int, module: ExpertsModule) -> Callable[[int], dict[str, torch.Tensor]]:
    """Return a function that gives one expert's tensors as the module has them."""
    runtime: Any = getattr(model, "moeflow", None)
    if runtime is None:
        parameters = {name: value for name, value in module._parameters.items() if value is not None}
        return lambda expert: {name: value[expert] for name, value in parameters.items()}
    layout = runtime.store.layers[layer].layout
    if layout.record.matrices and not any_lossless([runtime.store.layers[layer]]):
        raise ConfigError(
            f"{layout.name} is stored in {layout.record.matrices[0].format} already. Calibrate with the model's float "
            "checkpoint."
        )
    raw = np.empty(align_up(layout.record.num_bytes, PAGE_BYTES), np.uint8)

    def read(expert: int) -> dict[str, torch.Tensor]:
        runtime.store.read(ExpertKey(layer, expert), raw)
        found = parameters_of(torch.from_numpy(raw), layout.record_of(expert))
        return {name: value.to(runtime.device) for name, value in found.items()}

    return read


def _sample(tokens: torch.Tensor, probed: int) -> torch.Tensor:
    """Return places in `tokens` to measure on: all of the copied windows, and some of the others, evenly spread."""
    others = (tokens >= probed).nonzero()[:, 0]
    step = max(len(others) / _MAX_TOKENS_OF_EXPERT, 1.0)
    places = (torch.arange(int(len(others) / step)) * step).long().to(tokens.device)
    return torch.cat([(tokens < probed).nonzero()[:, 0], others[places]])


def _run(module: ExpertsModule, inputs: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    output = expert_mlp(
        inputs,
        weights,
        activation=experts_interface.activation_of(module),
        is_transposed=module.is_transposed,
    )
    return experts_interface.post_norm(module, output)


def _rounded(value: torch.Tensor, spec: WeightFormat, method: str, transposed: bool, name: str) -> torch.Tensor:
    matrix = value.T if transposed else value
    stored = quantize(matrix, spec, method=method, name=name)
    rows, columns = matrix.shape
    found = dequantize(stored, name, spec, (rows, columns), value.dtype)
    return found.T if transposed else found


def _bytes(weights: dict[str, torch.Tensor], spec: WeightFormat) -> int:
    # Transposed or not makes a difference only in groups that do not divide a side; experts' records decide then.
    shapes = [value.shape for value in weights.values() if value.dim() == 2]
    return sum(spec.num_bytes((rows, columns)) for rows, columns in shapes)


def _divergences(model: PreTrainedModel, hidden_states: torch.Tensor, num_windows: int, num_probes: int) -> np.ndarray:
    """Return [L, probes], mean KL of each copy's predictions from its window's, in nats a token."""
    head = model.get_output_embeddings()
    clean = [head(row).float().log_softmax(-1) for row in hidden_states[:num_probes]]
    found = []
    for copy, row in enumerate(hidden_states[num_windows:]):
        exact = clean[copy % num_probes]
        found.append((exact.exp() * (exact - head(row).float().log_softmax(-1))).sum(-1).double().mean().item())
    return np.maximum(np.array(found), 0.0).reshape(-1, num_probes)
