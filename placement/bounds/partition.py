"""A proven bound on partitions of a chain of layers, from the multipliers of a semidefinite relaxation.

X[i, j] is how much experts i and j share GPUs: the sum over GPUs of their shares of tokens there, 1 for two experts on
one GPU and 0 for two that never meet. A transition between them costs 1 - X[i, j]. For every placement, with or without
replicas,

- X - 1/G is positive semidefinite, its diagonal at most 1 - 1/G, and 0 <= X <= 1;
- where every GPU has E/G experts of each layer, every row of X sums to E/G in every layer; else to at most the slots;
- the work of layer l that row i shares GPUs with, sum_j X[i, j] w[j], is at most the work B[l] of l's busiest GPU.

The relaxation minimises transitions that cross plus the sum of B. X is needed within a layer and between consecutive
layers alone, so one matrix [2E, 2E] a pair of layers is enough. Alternating directions solve it, and only their
multipliers count: any multipliers, however rough, prove a bound, since each part of the Lagrangian has its minimum in
closed form. So the search may end at any time, and rounding errors are the arithmetic's alone.

Source: semidefinite relaxation of graph partitioning, Wolkowicz and Zhao, Discrete Applied Mathematics 96 (1999);
alternating directions, Wen, Goldfarb and Yin, Mathematical Programming Computation 2 (2010).
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_CHECK_INTERVAL = 25
_MIN_ITERATIONS, _FLOPS_PER_S = 60, 1e10  # fewer iterations prove nothing; the speed of one core
_MIN_GAIN = 2e-4  # share of the bound that four checks in a row must gain to go on


class Partition(NamedTuple):
    """A partition problem: L layers of E experts on G parts.

    Args:
        traffic: [L - 1, E, E] >= 0, cost of each transition that crosses.
        work: [L, E] >= 0, each expert's work; the busiest part of each layer counts once. None for traffic alone.
        num_parts: G.
        most: the most experts of a layer that a part may hold.
        equal: whether every part holds exactly E / G experts of every layer, one copy of each.
    """

    traffic: np.ndarray
    work: np.ndarray | None
    num_parts: int
    most: int
    equal: bool


def partition_bound(
    partition: Partition,
    *,
    iterations: int = 600,
    time_limit_s: float = float("inf"),
    progress: Callable[[float], None] | None = None,
) -> float:
    """Return a lower bound on every placement's cost: crossing traffic and, over the layers, the busiest part's work.

    Args:
        partition: the problem.
        iterations: the most to run; the search ends earlier where the bound stands still.
        time_limit_s: after which the best bound so far is returned; it is valid at any time. Where the matrices are
            too many or too large for the limit, the bound without traffic is returned.
        progress: called with the share of the iterations done.
    """
    end = time.monotonic() + time_limit_s
    scale = float(partition.traffic.sum())
    pairs, size = len(partition.traffic), 2 * partition.traffic.shape[1]
    if scale == 0 or _MIN_ITERATIONS * 10 * pairs * size**3 / _FLOPS_PER_S > time_limit_s:
        return _balance(partition)
    relaxation = _Relaxation(partition, scale)
    best, history = _balance(partition) / scale, []
    for iteration in range(1, iterations + 1):
        relaxation.step()
        if time.monotonic() > end:
            iteration = iterations
        if iteration % _CHECK_INTERVAL == 0 or iteration == iterations:
            best = max(best, relaxation.bound())
            history.append(best)
            if progress is not None:
                progress(iteration / iterations)
            if iteration == iterations or time.monotonic() > end:
                break
            if len(history) > 4 and history[-1] - history[-5] < _MIN_GAIN * abs(history[-1]):
                break
            relaxation.adapt()
    return best * scale


def _balance(partition: Partition) -> float:
    """Return the bound without traffic: work spread evenly."""
    if partition.work is None:
        return 0.0
    least = np.maximum(partition.work.sum(axis=1) / partition.num_parts, 0.0)
    return float(least.sum())


class _Relaxation:
    """The state of the alternating directions.

    Z holds X within layers [L, E, E] and between consecutive ones [L - 1, E, E]; copies of it are kept positive
    semidefinite (one a pair of layers) and within the caps on rows (one a layer and kind of cap).
    """

    def __init__(self, partition: Partition, scale: float):
        self.parts, self.equal = partition.num_parts, partition.equal
        self.cost = -partition.traffic / scale  # of X between layers; the constant 1 is added in bound()
        self.num_layers, self.num_experts = partition.traffic.shape[0] + 1, partition.traffic.shape[1]
        experts = self.num_experts
        self.caps: list[_WorkCap | _CountCap] = []
        if partition.work is not None:
            self.caps.append(_WorkCap(partition.work / scale, self.parts))
        if not partition.equal:
            self.caps.append(_CountCap((self.num_layers, experts), partition.most))
        # With equal parts all rows of X have one sum, so the rest of X is orthogonal to the vectors of ones.
        self.basis = _off_ones(experts) if self.equal else np.eye(2 * experts)
        self.trace = 2 * experts * (1 - 1 / self.parts)
        self.rho = 1.0 / self.num_layers / experts
        self.within = np.full((self.num_layers, experts, experts), 1 / self.parts)
        self.within[:, np.arange(experts), np.arange(experts)] = 1
        self.between = np.full(self.cost.shape, 1 / self.parts)
        self.multiplier = np.zeros((self.num_layers - 1, 2 * experts, 2 * experts))  # of the semidefinite copies
        self.cap_multipliers = [np.zeros((self.num_layers, 3 * experts, experts)) for _ in self.caps]
        self.primal = self.dual = 0.0

    def step(self) -> None:
        """Project every copy, average them into Z, and move the multipliers by the differences."""
        pairs = _pairs(self.within, self.between)
        semidefinite = self._semidefinite(pairs - self.multiplier)
        rows = _rows(self.within, self.between)
        capped = [
            cap.project(rows - multiplier, self.rho)
            for cap, multiplier in zip(self.caps, self.cap_multipliers, strict=True)
        ]
        within, between = self._average(semidefinite, capped)
        moved = _pairs(within - self.within, between - self.between)
        self.within, self.between = within, between
        together = _pairs(within, between)
        difference = semidefinite - together
        self.multiplier += difference
        self.primal = np.linalg.norm(difference) / np.linalg.norm(together)
        self.dual = np.linalg.norm(moved) / max(np.linalg.norm(self.multiplier), 1e-300)
        rows = _rows(within, between)
        for cap, multiplier, copy in zip(self.caps, self.cap_multipliers, capped, strict=True):
            multiplier += np.where(cap.seen, copy - rows, 0.0)

    def adapt(self) -> None:
        """Weigh agreement of the copies against progress."""
        factor = 1.5 if self.primal > 3 * self.dual else 1 / 1.5 if self.dual > 3 * self.primal else 1.0
        self.rho *= factor
        self.multiplier /= factor
        for multiplier in self.cap_multipliers:
            multiplier /= factor

    def bound(self) -> float:
        """Return the bound that the present multipliers prove: the Lagrangian's minimum, part by part."""
        multiplier = self.rho * self.multiplier
        within, between = _unpair(multiplier)
        value = 1.0 * -self.cost.sum()
        reduced = self.basis.T @ multiplier @ self.basis
        least = np.linalg.eigvalsh((reduced + reduced.transpose(0, 2, 1)) / 2)[:, 0]
        # trace(X - 1/G) is known where the diagonal is 1, and is at most that otherwise.
        least = least if self.equal else np.minimum(least, 0.0)
        value += multiplier.sum() / self.parts + self.trace * least.sum()
        for cap, rough in zip(self.caps, self.cap_multipliers, strict=True):
            exact, paid = cap.exact(self.rho * np.where(cap.seen, rough, 0.0))
            value += paid
            inside, across = _unrows(exact)
            within, between = within + inside, between + across
        diagonal = np.arange(self.num_experts)
        cost = -(within + within.transpose(0, 2, 1)) / 2
        ones = cost[:, diagonal, diagonal]
        value += ones.sum() if self.equal else np.minimum(ones, ones / self.parts).sum()  # 1/G <= X[i, i] <= 1
        cost[:, diagonal, diagonal] = 0
        return float(value + np.minimum(cost, 0).sum() + np.minimum(self.cost - between, 0).sum())

    def _semidefinite(self, target) -> np.ndarray:
        """Return the nearest X with X - 1/G positive semidefinite on the basis."""
        reduced = self.basis.T @ (target - 1 / self.parts) @ self.basis
        values, vectors = np.linalg.eigh((reduced + reduced.transpose(0, 2, 1)) / 2)
        reduced = (vectors * np.maximum(values, 0)[:, None, :]) @ vectors.transpose(0, 2, 1)
        return self.basis @ reduced @ self.basis.T + 1 / self.parts

    def _average(self, semidefinite, capped) -> tuple[np.ndarray, np.ndarray]:
        within, between = _unpair(semidefinite + self.multiplier)
        inside = np.full(self.num_layers, 2.0)
        inside[[0, -1]] -= 1
        across = 2.0
        for cap, copy, multiplier in zip(self.caps, capped, self.cap_multipliers, strict=True):
            more_within, more_between = _unrows(np.where(cap.seen, copy + multiplier, 0.0))
            within, between = within + more_within, between + more_between
            inside, across = inside + 1, across + 2
        within /= inside[:, None, None]
        within = np.clip((within + within.transpose(0, 2, 1)) / 2, 0, 1)
        diagonal = np.arange(self.num_experts)
        if self.equal:
            within[:, diagonal, diagonal] = 1
        else:
            within[:, diagonal, diagonal] = np.maximum(within[:, diagonal, diagonal], 1 / self.parts)
        return within, np.clip((between - self.cost / self.rho) / across, 0, 1)


class _WorkCap:
    """Each row shares GPUs with at most B, the work of the busiest GPU; the cost holds the sum of B over the layers.

    Args:
        work: [L, E].
        num_parts: G.
    """

    def __init__(self, work: np.ndarray, num_parts: int):
        self.work = work
        self.norm = np.maximum((work**2).sum(axis=1), 1e-300)
        self.least = work.sum(axis=1) / num_parts
        self.seen = _seen(*work.shape)

    def project(self, rows: np.ndarray, rho: float) -> np.ndarray:
        """Return the nearest rows [L, 3E, E] under the best caps."""
        found = np.where(self.seen[..., 0], (rows * self.work[:, None, :]).sum(axis=2), -np.inf)
        cap = np.maximum(_water_level(found, self.norm / rho), self.least)
        over = np.maximum(found - cap[:, None], 0) / self.norm[:, None]
        return rows - over[..., None] * self.work[:, None, :]

    def exact(self, multiplier: np.ndarray) -> tuple[np.ndarray, float]:
        """Return multipliers of the form that has a finite minimum, near the given ones, and that minimum.

        With -y work', y >= 0 and sum y <= 1: min of B - y (rows work) under rows work <= B and B >= least.
        """
        y = np.maximum(-(multiplier * self.work[:, None, :]).sum(axis=2), 0) / self.norm[:, None]
        y /= np.maximum(y.sum(axis=1, keepdims=True), 1.0)
        return -y[..., None] * self.work[:, None, :], float(((1 - y.sum(axis=1)) * self.least).sum())


class _CountCap:
    """Each row shares GPUs with at most as many experts of a layer as a part has slots.

    Args:
        shape: (L, E).
        most: slots.
    """

    def __init__(self, shape: tuple[int, int], most: int):
        self.most, self.num_experts = most, shape[1]
        self.seen = _seen(*shape)

    def project(self, rows: np.ndarray, rho: float) -> np.ndarray:
        """Return the nearest rows [L, 3E, E] whose sums are at most the slots."""
        over = np.maximum(rows.sum(axis=2) - self.most, 0) / self.num_experts
        return rows - over[..., None]

    def exact(self, multiplier: np.ndarray) -> tuple[np.ndarray, float]:
        """As `_WorkCap.exact`, for -y 1', y >= 0: the minimum is -most * sum y."""
        y = np.maximum(-multiplier.mean(axis=2), 0)
        return np.broadcast_to(-y[..., None], multiplier.shape), -float(self.most * y.sum())


def _water_level(values, amounts) -> np.ndarray:
    """Return [N], the level above which the parts of values [N, M] sum to amounts [N]."""
    ordered = -np.sort(-values, axis=1)
    counts = np.arange(1, values.shape[1] + 1)
    finite = np.where(np.isfinite(ordered), ordered, 0.0)
    levels = np.where(np.isfinite(ordered), (np.cumsum(finite, axis=1) - amounts[:, None]) / counts, -np.inf)
    return levels.max(axis=1)


def _off_ones(num_experts) -> np.ndarray:
    """Return [2E, 2E - 2], an orthonormal basis of the space orthogonal to each layer's vector of ones."""
    start = np.eye(num_experts)
    start[:, 0] = 1
    half = np.linalg.qr(start)[0][:, 1:]
    out = np.zeros((2 * num_experts, 2 * num_experts - 2))
    out[:num_experts, : num_experts - 1] = half
    out[num_experts:, num_experts - 1 :] = half
    return out


def _pairs(within, between) -> np.ndarray:
    """Return Z as one matrix [2E, 2E] for each pair of consecutive layers."""
    top = np.concatenate([within[:-1], between], axis=2)
    bottom = np.concatenate([between.transpose(0, 2, 1), within[1:]], axis=2)
    return np.concatenate([top, bottom], axis=1)


def _unpair(pairs) -> tuple[np.ndarray, np.ndarray]:
    """Sum the matrices of `_pairs` to within [L, E, E] and, both triangles together, between [L - 1, E, E]."""
    half = pairs.shape[1] // 2
    within = np.zeros((len(pairs) + 1, half, half))
    within[:-1] += pairs[:, :half, :half]
    within[1:] += pairs[:, half:, half:]
    return within, pairs[:, :half, half:] + pairs[:, half:, :half].transpose(0, 2, 1)


def _rows(within, between) -> np.ndarray:
    """Return [L, 3E, E], the shares with each layer of rows of the layer before, of itself and of the layer after."""
    none = np.zeros_like(within[:1])
    before = np.concatenate([none, between])
    after = np.concatenate([between.transpose(0, 2, 1), none])
    return np.concatenate([before, within, after], axis=1)


def _unrows(rows) -> tuple[np.ndarray, np.ndarray]:
    """Sum the rows of `_rows` back, as `_unpair` does."""
    size = rows.shape[2]
    before, within, after = rows[:, :size], rows[:, size : 2 * size], rows[:, 2 * size :]
    return within, before[1:] + after[:-1].transpose(0, 2, 1)


def _seen(num_layers, num_experts) -> np.ndarray:
    """Return [L, 3E, 1], which of those rows exist: the first layer has none before it, the last none after."""
    seen = np.ones((num_layers, 3 * num_experts, 1), bool)
    seen[0, :num_experts] = False
    seen[-1, 2 * num_experts :] = False
    return seen
