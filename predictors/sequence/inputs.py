"""Inputs of the sequence model: the evidence of each step, computed for whole sequences at once, for training.

SequencePredictor computes the same step by step; a test holds the two together. All evidence is in log-odds or 0/1 an
expert, so that the model only has to weigh it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from moeflow.predictors.odds import MIN_PROBABILITY, multi_hot, weighted_hot
from moeflow.predictors.sequence.repeats import find_repeats
from moeflow.predictors.sequence.token_table import PRIOR_TOKENS, TokenTable

RECENT_HALF_LIVES = (8.0, 64.0)  # steps
RECALL_HALF_LIFE = 200.0  # steps, of the routes of the same token earlier in the sequence
NUM_EVIDENCE = 8  # token, recall, two of recent use, repeats of three orders, the previous step
NUM_CONTEXT = 7  # columns of context()
MAX_POSITION = 512
NO_REPEAT = math.log1p(1000)


@dataclass
class SequenceInputs:
    """Inputs of one sequence, or of several padded to one length with a leading dimension B.

    Args:
        token_rows: [T], TokenTable row of the token fed.
        previous_rows: [T], of the one before it; 0 at the start.
        previous: [T, L * E], weighted routes of the step before.
        evidence: [T, NUM_EVIDENCE, L * E].
        context: [T, NUM_CONTEXT].
        repeats: [T], the position whose continuation is the best guess at this one's; -1 where there is none.
        routes: [T, L * E], the truth, 0 or 1.
        valid: [T], False where padding.
    """

    token_rows: torch.Tensor
    previous_rows: torch.Tensor
    previous: torch.Tensor
    evidence: torch.Tensor
    context: torch.Tensor
    repeats: torch.Tensor
    routes: torch.Tensor
    valid: torch.Tensor

    def window(self, start: int, stop: int) -> "SequenceInputs":
        """Return the steps from start to stop of padded sequences."""
        return SequenceInputs(**{name: value[:, start:stop] for name, value in vars(self).items()})


def sequence_inputs(
    table: TokenTable,
    token_ids: np.ndarray,
    experts: np.ndarray,
    weights: np.ndarray | None,
    *,
    leave_out: bool,
    device: str | torch.device = "cpu",
) -> SequenceInputs:
    """Compute the inputs of one sequence.

    Args:
        table: counts of training.
        token_ids: [T].
        experts: [T, L, K].
        weights: [T, L, K] or None.
        leave_out: whether this sequence is in the table and must be taken out of it.
        device: where to compute.
    """
    num_experts, length = table.popularity.shape[1], len(token_ids)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    routes = tensor(multi_hot(experts, num_experts)).flatten(1)
    weighted = tensor(weighted_hot(experts, weights, num_experts)).flatten(1)
    rows = table.rows(token_ids)
    counts, num_seen = tensor(table.counts[rows].astype(np.float32)).flatten(1), tensor(table.num_seen[rows]).float()
    ids = tensor(token_ids.astype(np.int64))
    same = (ids[:, None] == ids[None]).float()
    if leave_out:
        known = tensor((rows > 0).astype(np.float32))
        counts = (counts - known[:, None] * (same @ routes)).clamp_min(0)
        num_seen = (num_seen - known * same.sum(1)).clamp_min(0)
    popularity = tensor(table.popularity).flatten()
    general = _log_odds(popularity)
    token = (counts + PRIOR_TOKENS * popularity) / (num_seen[:, None] + PRIOR_TOKENS)
    steps = torch.arange(length, device=device)
    age = (steps[:, None] - steps[None]).float()
    earlier = torch.tril(same * torch.exp2(-age / RECALL_HALF_LIFE), -1)
    recalled = earlier.sum(1)
    recall = (earlier @ routes + token) / (recalled[:, None] + 1)
    evidence = [_log_odds(token) - general, _log_odds(recall) - _log_odds(token)]
    for half_life in RECENT_HALF_LIVES:
        decayed = torch.tril(torch.exp2(-age.clamp_min(0) / half_life), -1)
        recent = (decayed @ routes + popularity) / (decayed.sum(1, keepdim=True) + 1)
        evidence.append(_log_odds(recent) - general)
    repeats, runs = find_repeats(token_ids)
    for positions in repeats.T:
        at = tensor(positions)
        evidence.append(routes[at.clamp_min(0)] * (at >= 0)[:, None])
    evidence.append(torch.cat([torch.zeros_like(routes[:1]), routes[:-1]]))
    return SequenceInputs(
        token_rows=tensor(rows),
        previous_rows=tensor(np.r_[0, rows[:-1]].astype(np.int64)),
        previous=torch.cat([torch.zeros_like(weighted[:1]), weighted[:-1]]),
        evidence=torch.stack(evidence, 1),
        context=tensor(context(num_seen.cpu().numpy(), recalled.cpu().numpy(), repeats, runs, np.arange(length))),
        repeats=tensor(best_repeat(repeats)),
        routes=routes,
        valid=torch.ones(length, dtype=torch.bool, device=device),
    )


def context(
    num_seen: np.ndarray, recalled: np.ndarray, repeats: np.ndarray, runs: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Return [T, NUM_CONTEXT]: the number of observations behind each piece of evidence.

    Args:
        num_seen: [T], how often the token was fed in training.
        recalled: [T], how often in this sequence, the distant past counting less.
        repeats: [T, NUM_ORDERS], positions of repeats or -1.
        runs: [T], tokens that the longest repeat lasts so far.
        positions: [T], steps since the start.
    """
    since = np.where(repeats[:, 0] >= 0, np.log1p(positions - repeats[:, 0]), NO_REPEAT)
    columns = (
        np.log1p(num_seen),
        np.log1p(recalled),
        repeats[:, 1] >= 0,
        repeats[:, 2] >= 0,
        since / 4,
        np.log1p(np.minimum(positions, MAX_POSITION)) / 4,
        np.log1p(np.minimum(runs, MAX_POSITION)) / 4,
    )
    return np.stack([np.asarray(column, np.float32) for column in columns], 1)


def best_repeat(repeats: np.ndarray) -> np.ndarray:
    """Return [T]: of repeats [T, NUM_ORDERS] the position of the longest, -1 where there is none."""
    best = repeats[:, 0]
    for positions in repeats.T[1:]:
        best = np.where(positions >= 0, positions, best)
    return best


def pad_inputs(inputs: list[SequenceInputs]) -> SequenceInputs:
    """Stack sequences, shorter ones padded at their end."""
    padded = {
        name: torch.nn.utils.rnn.pad_sequence([getattr(one, name) for one in inputs], batch_first=True)
        for name in SequenceInputs.__dataclass_fields__
    }
    return SequenceInputs(**padded)


def _log_odds(probability: torch.Tensor) -> torch.Tensor:
    probability = probability.clamp(MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return torch.log(probability) - torch.log1p(-probability)
