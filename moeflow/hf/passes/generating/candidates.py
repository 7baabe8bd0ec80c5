"""Candidates that transformers' assisted decoding verifies, in place of those of its own prompt lookup."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from moeflow.hf.version import parts_of_transformers

with parts_of_transformers():
    from transformers import PreTrainedModel
    from transformers.generation.candidate_generator import CandidateGenerator, PromptLookupCandidateGenerator


class Lookup(NamedTuple):
    """What a call asks of prompt lookup.

    Args:
        most: candidates of a step.
        max_length: tokens of prompt and answer.
        ends: tokens behind which the answer ends.
    """

    most: int
    max_length: int
    ends: frozenset[int]


class Drafts(Protocol):
    """Candidates of one call of `generate`."""

    def propose(self, ids: torch.Tensor) -> list[int] | None:
        """Return tokens that may follow ids [N]; None where transformers' own candidates are to be verified."""
        ...

    def judge(self, num_accepted: int) -> None:
        """Take in how many of them were accepted."""
        ...


class _Candidates(CandidateGenerator):
    """Candidates of drafts, as transformers asks for them."""

    def __init__(self, drafts: Drafts, own: PromptLookupCandidateGenerator) -> None:
        self._drafts, self._own = drafts, own

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return ids [1, N] with the tokens behind them that are to be verified."""
        tokens = self._drafts.propose(input_ids[0])
        if tokens is None:
            return self._own.get_candidates(input_ids)
        return torch.cat((input_ids, input_ids.new_tensor([tokens])), dim=1) if tokens else input_ids, None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        """Take in how many of the tokens were accepted."""
        self._drafts.judge(int(num_matches))


def draft_lookups(model: PreTrainedModel, begin: Callable[[Lookup], Drafts | None]) -> None:
    """Let greedy calls of `generate` with prompt lookup verify other candidates, where a model has such calls.

    Sampled ones keep transformers' candidates: what they draw depends on how many are verified.

    Args:
        model: whose `generate` is changed.
        begin: returns the drafts of a call; None for transformers' own.
    """
    behind = weakref.ref(model)
    changed: Any = model
    kind: Any = type(model)
    if not hasattr(kind, "_get_candidate_generator"):  # it decodes in a way of its own, or not at all
        return
    signature = inspect.signature(kind._get_candidate_generator)

    def candidate_generator(*args: Any, **kwargs: Any) -> CandidateGenerator:
        own = kind._get_candidate_generator(behind(), *args, **kwargs)
        settings = signature.bind(None, *args, **kwargs).arguments["generation_config"]
        if settings.do_sample or type(own) is not PromptLookupCandidateGenerator:
            return own
        ends = frozenset() if own.eos_token_id is None else frozenset(own.eos_token_id.reshape(-1).tolist())
        drafts = begin(Lookup(own.num_output_tokens, own.max_length, ends))
        return own if drafts is None else _Candidates(drafts, own)

    changed._get_candidate_generator = candidate_generator
