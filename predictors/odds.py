"""Probabilities and log-odds: the arithmetic all predictors share."""

import math

import numpy as np

MIN_PROBABILITY = 1e-4


def log_odds(probability: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)), with p kept MIN_PROBABILITY away from 0 and 1; NaN stays NaN."""
    p = np.minimum(np.maximum(probability, MIN_PROBABILITY), 1 - MIN_PROBABILITY)
    return np.log(p / (1 - p))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-logits)) without overflow, in the dtype of the logits."""
    return 0.5 * (np.tanh(0.5 * logits) + 1)


def multi_hot(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Return float32 [..., E] with a one at each of experts [..., K]; those of num_experts or more are left out."""
    return _scatter(experts, np.float32(1), num_experts)


def weighted_hot(experts: np.ndarray, weights: np.ndarray | None, num_experts: int) -> np.ndarray:
    """Return float32 [..., E]: 1 on average at experts [..., K], more where the weight is more; 1 without weights."""
    if weights is None:
        return multi_hot(experts, num_experts)
    weights = weights.astype(np.float32)
    share = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-6)
    return _scatter(experts, 0.5 + 0.5 * experts.shape[-1] * share, num_experts)


def _scatter(experts: np.ndarray, values: np.ndarray | np.float32, num_experts: int) -> np.ndarray:
    """Return float32 [..., E] with values [..., K] at experts [..., K]."""
    lead, top_k = experts.shape[:-1], experts.shape[-1]
    rows = np.zeros((math.prod(lead), num_experts + 1), np.float32)  # the last column for those that stand for none
    places = np.minimum(experts, num_experts).reshape(-1, top_k)
    rows[np.arange(len(rows))[:, None], places] = np.reshape(values, (-1, top_k)) if np.ndim(values) else values
    return rows[:, :-1].reshape(*lead, num_experts)
