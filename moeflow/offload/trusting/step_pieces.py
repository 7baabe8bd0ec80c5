"""Asking steps that are captured in pieces: all that a model launches between two calls of experts.

A replay runs a piece, lets Python run the experts on what the piece left, and goes on with the next. Knows nothing of
how experts are run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moeflow.offload.trusting.capture import Capture
from moeflow.offload.trusting.captured_steps import CannotCaptureError, CapturedSteps, Recorded

# (hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]
RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class _Call(NamedTuple):
    """A call of experts behind a piece. What the piece writes, and what the next one reads, stay where they are."""

    layer: int
    run: RunExperts
    routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    output: torch.Tensor


class Cutting:
    """Takes the place of experts while a step is captured: none runs, so that nothing is asked for or counted.

    Args:
        cut: ends a piece and begins the next.
        outputs: layers, and what the pieces behind their experts read; None to make them.
    """

    def __init__(self, cut: Callable[[], None], outputs: list[tuple[int, torch.Tensor]] | None) -> None:
        self.calls: list[_Call] = []
        self._cut = cut
        self._outputs = outputs

    def add(
        self,
        layer: int,
        run: Callable[[], RunExperts],
        routed: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Take in a call of experts; return zeros, or what a later piece is to read.

        Args:
            layer: number among the MoE layers.
            run: returns what runs its experts behind a replayed piece.
            routed: what they are called with.

        Raises:
            CannotCaptureError: they were called otherwise the time before.
        """
        if self._outputs is None:
            output = torch.zeros_like(routed[0])
        else:
            known, output = self._outputs[len(self.calls)] if len(self.calls) < len(self._outputs) else (-1, routed[0])
            if known != layer or output.shape != routed[0].shape or output.dtype != routed[0].dtype:
                raise CannotCaptureError("the model calls its experts in another order or number each time")
        self.calls.append(_Call(layer, run(), routed, output))
        self._cut()
        return output


class StepPieces(CapturedSteps):
    """The asking steps of one model.

    Args:
        capture: of its device.

    Attributes:
        cutting: what takes the place of experts while a step is captured; None where they run.
    """

    def __init__(self, capture: Capture) -> None:
        super().__init__(capture)
        self.cutting: Cutting | None = None

    def _record(self, capture: Capture, begin: Callable[..., Any], run: Callable[[], Any]) -> Recorded:
        passes: list[Cutting] = []

        def run_cut(cut: Callable[[], None]) -> Any:
            warmed = [(call.layer, call.output) for call in passes[0].calls] if passes else None
            self.cutting = Cutting(cut, warmed)
            passes.append(self.cutting)
            return run()

        try:
            made, pieces = capture.capture_pieces(run_cut)
        finally:
            self.cutting = None
        calls = passes[-1].calls
        if not calls or len(calls) != len(passes[0].calls):
            raise CannotCaptureError("the model calls no experts, or calls them in another order or number each time")

        def replay() -> None:
            for piece, call in zip(pieces, calls, strict=False):
                piece()
                call.output.copy_(call.run(*call.routed))
            pieces[-1]()

        return Recorded(made, begin, replay)
