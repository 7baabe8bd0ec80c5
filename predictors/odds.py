"""Probabilities and log-odds: the arithmetic all predictors share."""

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
    one_hot = np.zeros((*experts.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(one_hot, np.minimum(experts, num_experts).astype(np.intp), 1.0, -1)
    return np.ascontiguousarray(one_hot[..., :-1])


def weighted_hot(experts: np.ndarray, weights: np.ndarray | None, num_experts: int) -> np.ndarray:
    """Return float32 [..., E]: 1 on average at experts [..., K], more where the weight is more; 1 without weights."""
    if weights is None:
        return multi_hot(experts, num_experts)
    values = np.zeros((*experts.shape[:-1], num_experts + 1), np.float32)
    weights = weights.astype(np.float32)
    share = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-6)
    weighed = 0.5 + 0.5 * experts.shape[-1] * share
    np.put_along_axis(values, np.minimum(experts, num_experts).astype(np.intp), weighed, -1)
    return np.ascontiguousarray(values[..., :-1])
