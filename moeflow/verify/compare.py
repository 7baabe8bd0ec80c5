"""Compares one layer after the other while a pass runs: moeflow's experts, and transformers' own on the same tokens.

The pass goes on from the reference's output, so that each layer is compared on the reference's hidden states and a
difference shows where it arises.
"""

from collections.abc import Callable
from typing import Any

import torch

from moeflow.hf import experts_interface
from moeflow.hf.eager.experts import run_expert
from moeflow.hf.eager.gguf import GgufWeights
from moeflow.hf.eager.stored_weights import StoredWeights
from moeflow.hf.experts_interface import ExpertsModule
from moeflow.hf.passes.residual import ResidualTap
from moeflow.kernels.quantization.formats import find_format
from moeflow.progress import ProgressCallback
from moeflow.verify.bounds import output_bound, weights_bound
from moeflow.verify.findings import Finding, LayerFigures
from moeflow.verify.reference import ReferenceWeights

_DECODED = 4  # tokens of a layer that are run alone as well, as in decoding
Values = dict[str, torch.Tensor]
Forms = dict[str, str | None]


class Comparison:
    """Hooks on every layer's experts.

    Args:
        model: loaded by load_moe.
        own: the model's experts, as its store reads them.
        reference: the experts that they should be.
        token_ids: of the pass, in order.
        progress: called with (layers compared, layers in all).

    Attributes:
        layers: figures of each layer that was run.
        findings: differences beyond the bound.
    """

    def __init__(
        self,
        model: Any,
        own: StoredWeights,
        reference: ReferenceWeights,
        token_ids: list[int],
        progress: ProgressCallback | None = None,
    ) -> None:
        self.layers: list[LayerFigures] = []
        self.findings: list[Finding] = []
        self.bound = 0.0
        self._own, self._reference, self._token_ids = own, reference, token_ids
        self._progress, self._tap = progress, ResidualTap(model)
        self._modules = experts_interface.experts_modules(model)
        self._hooks = [
            module.register_forward_hook(self._hook(layer), with_kwargs=True)
            for layer, (_, module) in enumerate(self._modules)
        ]
        self._tap.listen(True)

    def close(self) -> None:
        """Take the hooks off."""
        self._tap.close()
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: int) -> Callable[[ExpertsModule, tuple, dict, torch.Tensor], torch.Tensor]:
        def compare(module: ExpertsModule, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
            routed = experts_interface.experts_arguments(args, kwargs)
            with torch.no_grad():
                return _Layer(self, layer, module, *routed).compare(output)

        return compare

    def values(self, layer: int, expert: int) -> tuple[Values, Values, Forms]:
        """Return an expert's values as stored, as they should be, and the weight formats between them.

        Where the reference is a GGUF file its blocks are what the values should be: nothing was rounded.
        """
        own, wanted = self._own.read(layer, expert), self._reference.read(layer, expert)
        forms = {name: self._own.form(layer, expert, name) for name in wanted}
        if isinstance(self._reference, GgufWeights):
            forms = {
                name: None if form is not None and find_format(form).kind == "ggml" else form
                for name, form in forms.items()
            }
        return own, wanted, forms

    def path(self, layer: int) -> str:
        """Return the name of a layer's experts module."""
        return self._modules[layer][0]

    def file(self, layer: int, expert: int) -> str:
        """Return the file that an expert was read from."""
        return self._own.file(layer, expert)

    def residual(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return the residual stream in front of a layer's norm."""
        return self._tap.residual(layer, hidden_states)

    def found(self, layer: int, token: int, expert: int | None, what: str, figures: tuple[float, float, str]) -> None:
        """Keep a difference: (difference, bound, detail)."""
        token_id = self._token_ids[token] if token < len(self._token_ids) else -1
        self.findings.append(Finding(token, token_id, layer, self.path(layer), expert, what, *figures))

    def compared(self, figures: LayerFigures) -> None:
        """Keep a layer's figures; its findings get into their order."""
        self.layers.append(figures)
        self.findings.sort(key=lambda one: (one.layer, one.token, one.what != "weights"))
        if self._progress is not None:
            self._progress(len(self.layers), len(self._modules))


class _Layer:
    """One call of one layer's experts: hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]."""

    def __init__(
        self,
        whole: Comparison,
        layer: int,
        module: ExpertsModule,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> None:
        self._whole, self._layer, self._module = whole, layer, module
        self._routed = hidden_states, top_k_index, top_k_weights
        self._bound = output_bound(hidden_states.dtype, top_k_index.shape[1])
        self._told: set[int | None] = set()  # experts whose difference is kept already

    def compare(self, output: torch.Tensor) -> torch.Tensor:
        """Compare moeflow's output [T, H]; return the reference's."""
        hidden_states, top_k_index, _ = self._routed
        expected, scale = torch.zeros_like(hidden_states), hidden_states.new_zeros(len(output), dtype=torch.float32)
        rounding, met = 0.0, 0
        for expert in range(self._module.num_experts):
            ranks, tokens = torch.where((top_k_index == expert).T)  # in the order of transformers' own loop
            if len(tokens):
                met += 1
                values, changed = self._values(expert, int(tokens.min()))
                rounding = max(rounding, changed)
                part = self._eager(values, tokens, ranks)
                expected.index_add_(0, tokens, part.to(expected.dtype))
                scale.index_add_(0, tokens, part.float().norm(dim=-1))
        difference = _relative(output - expected, scale)
        beyond = (~(difference <= self._bound)).nonzero()[:, 0].tolist()
        for token in beyond:
            self._tell(token, "output", float(difference[token]))
        step = max(len(output) // _DECODED, 1)
        alone = [self._decode(token, expected, scale) for token in range(0, len(output), step)]
        self._whole.bound = max(self._whole.bound, self._bound)
        self._whole.compared(
            LayerFigures(
                self._layer, self._whole.path(self._layer), met, self._module.num_experts,
                float(difference.max()), max(alone), self._of_layer(output, expected), rounding,
                int(difference.nan_to_num(torch.inf).argmax()),
            )
        )  # fmt: skip
        return expected

    def _values(self, expert: int, token: int) -> tuple[Values, float]:
        """Return what transformers' code runs with, and the change by the weight format; compare the weights."""
        own, wanted, forms = self._whole.values(self._layer, expert)
        largest = 0.0
        for name, value in wanted.items():
            form = forms[name]
            figures = _compare_exactly(own[name], value) if form is None else _compare_rounded(own[name], value, form)
            largest = max(largest, figures[0] if form is not None else 0.0)
            if not figures[0] <= figures[1] or figures[2]:
                told = f"{name} in {self._whole.file(self._layer, expert)}{figures[2]}"
                self._whole.found(self._layer, token, expert, "weights", (*figures[:2], told))
                self._told.add(expert)
                break
        return _run_with(own, wanted, forms), largest

    def _eager(self, values: Values, tokens: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
        hidden_states, _, top_k_weights = self._routed
        on_device = {name: value.to(hidden_states.device) for name, value in values.items()}
        return run_expert(self._module, on_device, hidden_states[tokens], top_k_weights[tokens, ranks])

    def _decode(self, token: int, expected: torch.Tensor, scale: torch.Tensor) -> float:
        """Run one token alone, as in decoding; return its difference."""
        one = slice(token, token + 1)
        output = self._module._moeflow.run(*(part[one] for part in self._routed))
        difference = float(_relative(output - expected[one], scale[one]))
        if not difference <= self._bound:
            self._tell(token, "decode", difference)
        return difference

    def _tell(self, token: int, what: str, difference: float) -> None:
        """Keep a token's difference, with the expert that it is of; once an expert."""
        if not torch.isfinite(self._routed[0][token]).all():
            expert, detail = None, "the hidden states before the experts are not finite"
        else:
            expert, detail = self._culprit(token)
        if expert not in self._told:
            self._told.add(expert)
            self._whole.found(self._layer, token, expert, what, (difference, self._bound, detail))

    def _culprit(self, token: int) -> tuple[int | None, str]:
        """Run each expert of a token alone on both sides; return the one that differs most beyond the bound."""
        hidden_states, top_k_index, top_k_weights = (part[token : token + 1] for part in self._routed)
        worst: tuple[float, int | None] = (self._bound, None)
        where = torch.tensor([token], device=hidden_states.device)
        for rank, expert in enumerate(top_k_index[0].tolist()):
            if not 0 <= expert < self._module.num_experts:
                continue
            values = _run_with(*self._whole.values(self._layer, expert))
            rank_of = torch.tensor([rank], device=hidden_states.device)
            part = self._eager(values, where, rank_of)
            one = top_k_index[:, rank : rank + 1], top_k_weights[:, rank : rank + 1]
            output = self._module._moeflow.run(hidden_states, *one)
            difference = float(_relative(output - part, part.float().norm(dim=-1)))
            if not difference <= worst[0]:
                worst = float("inf") if difference != difference else difference, expert
        return worst[1], "its output" if worst[1] is not None else "their outputs are right, one by one"

    def _of_layer(self, output: torch.Tensor, expected: torch.Tensor) -> float | None:
        residual = self._whole.residual(self._layer, self._routed[0])
        if residual is None:
            return None
        return float(_relative(output - expected, (residual + expected).float().norm(dim=-1)).max())


def _run_with(own: Values, wanted: Values, forms: Forms) -> Values:
    """Return what transformers' code runs with: the stored values of what was rounded, the reference's of all else."""
    return {name: value if forms[name] is None else own[name] for name, value in wanted.items()}


def _relative(difference: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return each token's norm of a difference [T, H] as a part of its scale [T]; 0 of 0 is 0."""
    norm = difference.float().norm(dim=-1)
    return torch.where(norm == 0, 0.0, norm / scale)


def _compare_exactly(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float, str]:
    """Compare values that must be the same: (largest difference, 0, the first that differs)."""
    places = (found != wanted).nonzero()
    if not len(places):
        return 0.0, 0.0, ""
    place = tuple(places[0].tolist())
    told = f": {len(places)} values differ, the first at {list(place)} is {float(found[place]):.6g}, it should be "
    return float((found - wanted).abs().max()), 0.0, f"{told}{float(wanted[place]):.6g}"


def _compare_rounded(found: torch.Tensor, wanted: torch.Tensor, form: str) -> tuple[float, float, str]:
    """Compare a matrix in a weight format with what it was rounded from: (relative difference, bound, nothing)."""
    norm, bound = wanted.float().norm(), weights_bound(form)
    change = float((found.float() - wanted.float()).norm())
    relative = change / float(norm) if change else 0.0
    return relative, bound, "" if relative <= bound else f" is not {form} of the reference's"
