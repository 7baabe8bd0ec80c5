"""What a comparison found.

Knows numbers and words. Knows nothing of models.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One difference beyond its bound.

    Args:
        token: its place in the text, rows one after the other; of weights the first that is routed to the expert.
        token_id: the token.
        layer: number among the MoE layers.
        path: of the layer's experts module.
        expert: its number; None where every expert of the token is right and their sum is not.
        what: "weights", "output" (of all tokens together) or "decode" (of the token alone).
        difference: relative, as the bound; of weights that must be the same, the largest of a value.
        bound: what is allowed.
        detail: in words.
    """

    token: int
    token_id: int
    layer: int
    path: str
    expert: int | None
    what: str
    difference: float
    bound: float
    detail: str

    def __str__(self) -> str:
        whose = "the sum of its experts" if self.expert is None else f"expert {self.expert}"
        return (
            f"token {self.token} (id {self.token_id}), layer {self.layer} ({self.path}), {whose}: {self.detail}; "
            f"difference {self.difference:.3g}, bound {self.bound:.3g}"
        )


@dataclass(frozen=True)
class LayerFigures:
    """One layer's comparison.

    Args:
        layer: number among the MoE layers.
        path: of its experts module.
        experts: that a token was routed to.
        num_experts: of the layer.
        difference: largest of a token's routed output, as a part of the summed norms of its experts' outputs.
        decode_difference: the same of tokens that were run alone.
        layer_difference: largest as a part of the residual stream behind the layer; None where that was not seen.
        rounding: largest change of a matrix by its weight format, as a part of its norm; 0 where every bit was kept.
        token: with the largest difference.
    """

    layer: int
    path: str
    experts: int
    num_experts: int
    difference: float
    decode_difference: float
    layer_difference: float | None
    rounding: float
    token: int


@dataclass
class Verified:
    """The comparison of a model with its reference.

    Args:
        model: the folder.
        reference: the folder that it was compared with.
        independent: whether transformers alone read the reference's weights; else moeflow's store did.
        dtype: of the hidden states.
        num_tokens: compared in every layer.
        bound: of outputs, relative.
        layers: figures of each.
        findings: differences beyond the bound, by layer and token; at most one a layer, expert and kind.
    """

    model: str
    reference: str
    independent: bool
    dtype: str
    num_tokens: int
    bound: float = 0.0
    layers: list[LayerFigures] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing is beyond its bound."""
        return not self.findings

    @property
    def first(self) -> Finding | None:
        """The first difference, by layer and token."""
        return self.findings[0] if self.findings else None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {"equal": self.equal, **asdict(self)}

    def __str__(self) -> str:
        if self.first is None:
            worst = max(self.layers, key=lambda layer: layer.difference)
            return (
                f"equal: {self.num_tokens} tokens, {len(self.layers)} layers, bound {self.bound:.2g} ({self.dtype}); "
                f"the largest difference is {worst.difference:.2g}, of token {worst.token} in layer {worst.layer}"
            )
        more = len(self.findings) - 1
        others = f"; {more} more in layers {sorted({one.layer for one in self.findings[1:]})}" if more else ""
        return f"differs: {self.first}{others}"
