"""Serial runner: computes the pieces of one sequence by steps of `generate`, and returns their logits.

Knows passes and caches as wholes. Knows nothing of requests.
"""

import time
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from moeflow.engine.model_runner import Computed
from moeflow.engine.sequence import Piece, Sequence
from moeflow.engine.serial.family_caches import FamilyCaches
from moeflow.errors import ExpertReadError, UnsupportedModelError
from moeflow.hf.passes.generating.generate_step import generate_step, is_lasting, prompt_logits
from moeflow.hf.vision.image_inputs import ImageInputs
from moeflow.hf.vision.image_steps import ImageSteps
from moeflow.turns import Turns

_PASS_ERRORS = (ExpertReadError, OSError, RuntimeError)
_MODEL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
_TRIED_TOKENS = 8  # by which it is seen whether several at once go on exactly


class SerialRunner:
    """Runs one sequence at a time on a model, whatever the model keeps of earlier positions.

    Args:
        model: whose steps these are.
        budget_bytes: most bytes of caches that are kept of sequences that have ended.

    Attributes:
        memory: where caches lie.

    Raises:
        UnsupportedModelError: the model does not generate token by token.
    """

    def __init__(self, model: PreTrainedModel, budget_bytes: int) -> None:
        self._model = model
        self._turns = getattr(getattr(model, "moeflow", None), "turns", None) or Turns()
        self._steps = ImageSteps(model)
        self.memory = FamilyCaches(budget_bytes, partial(is_lasting, model))
        self._turns.run(self._try_a_step)

    def sequence(self, id: str, prompt_ids: list[int], max_new_tokens: int, priority: int = 0) -> Sequence:
        """Make a sequence."""
        return Sequence(id, prompt_ids, max_new_tokens, priority=priority)

    def stats(self) -> dict[str, Any]:
        """Return what that of `ModelRunner` does: nothing is retried, and caches keep what they keep."""
        return {"retries": 0, "kv_format": "auto", "kv_policy": None}

    def run(self, pieces: list[Piece]) -> list[Computed]:
        """Compute pieces, one after the other."""
        computed = []
        for piece in pieces:
            try:
                computed.append(Computed(piece, self._turns.run(self._compute, piece)))
            except _PASS_ERRORS as error:
                computed.append(Computed(piece, None, f"{type(error).__name__}: {error}"))
            except _MODEL_ERRORS as error:
                if piece.sequence.images is None:
                    raise
                name = type(self._model).__name__
                told = f"{name} cannot read the prompt's images ({type(error).__name__}: {error})."
                computed.append(Computed(piece, None, told))
        return computed

    def _compute(self, piece: Piece) -> torch.Tensor:
        """Compute a piece and what its sequence lacks before it; return logits [1, V], or of all its tokens."""
        sequence = piece.sequence
        own = self.memory[sequence.id]
        ids = (sequence.prompt_ids + sequence.token_ids)[: sequence.num_computed + len(piece.tokens)]
        scores = None
        if sequence.scored and not sequence.token_ids:
            scores = self._score(ids)
            if sequence.max_new_tokens == 1:
                own.num_positions = len(ids)
                return scores
        covered, cache = own.num_positions, own.take()
        begin_s, whole = time.perf_counter(), cache is None
        if whole:
            covered = 0
        images = cast("ImageInputs | None", sequence.images)
        tried = ids if images is None else list(range(_TRIED_TOKENS))  # none of an image's
        branch = 0 if sequence.token_ids or images else self.memory.branch_point(ids)
        if whole or self._takes_several(tried, len(ids) - covered):
            cut = covered < branch < len(ids) and self._takes_several(tried, len(ids) - branch)
            ends = [branch, len(ids)] if cut else [len(ids)]
        else:
            ends = list(range(covered + 1, len(ids) + 1))
        for end in ends:
            logits, cache, own.shifts = self._steps.step(ids[:end], cache, own.shifts, images)
            if covered < end == branch:
                self.memory.keep_branch(ids[:end], cache, own.shifts)
        own.cache, own.num_positions = cache, len(ids)
        self._note_speed(time.perf_counter() - begin_s, len(ends), len(ids) - covered, whole=whole)
        return logits[None] if scores is None else scores

    def _note_speed(self, seconds: float, num_steps: int, num_tokens: int, *, whole: bool) -> None:
        if whole:
            self.memory.prefill_s = seconds / num_tokens
        elif num_steps == num_tokens:
            self.memory.step_s = seconds / num_steps

    def _score(self, ids: list[int]) -> torch.Tensor:
        """Return the logits [N, V] of a prompt.

        Raises:
            RuntimeError: the model gives none.
        """
        try:
            return prompt_logits(self._model, ids)
        except _PASS_ERRORS:
            raise
        except _MODEL_ERRORS as error:
            name = type(self._model).__name__
            raise RuntimeError(f"{name} gives no log-probabilities of a prompt ({type(error).__name__}).") from error

    def _takes_several(self, ids: list[int], count: int) -> bool:
        """Whether so many tokens are given to the model at once, behind those that its cache covers."""
        if count == 1:
            return True
        if self.memory.several is None and len(ids) >= _TRIED_TOKENS:
            try:
                self.memory.several = self._try_several(ids[:_TRIED_TOKENS])
            except _PASS_ERRORS:
                return False
        return bool(self.memory.several)

    def _try_several(self, ids: list[int]) -> bool:
        """Compare half of these tokens at once behind the other half with all in one pass, and with one by one."""
        half, by_one = len(ids) // 2, torch.empty(0)
        whole, _ = generate_step(self._model, ids)
        _, cache = generate_step(self._model, ids[:half])
        at_once, _ = generate_step(self._model, ids, cache)
        _, cache = generate_step(self._model, ids[:half])
        for end in range(half + 1, len(ids) + 1):
            by_one, cache = generate_step(self._model, ids[:end], cache)
        rounding = 4 * float((by_one - whole).abs().max()) + 1e-3 * float(whole.abs().max())
        return float((at_once - whole).abs().max()) <= rounding

    def _try_a_step(self) -> None:
        name = type(self._model).__name__
        if not self._model.can_generate() or getattr(self._model.config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{name} is not a decoder that generates token by token.")
        try:
            generate_step(self._model, [0])
        except ExpertReadError:
            return  # requests that need this expert fail
        except _MODEL_ERRORS as error:
            raise UnsupportedModelError(
                f"{name} cannot run a step of `generate` ({type(error).__name__}: {error})."
            ) from error
