"""Recall and precision of predictors over the sequences of a trace that they were not trained on.

Knows predictors and traces. Knows nothing of caches, links or prefetches.
"""

import numpy as np

from moeflow.predictors.odds import multi_hot
from moeflow.predictors.protocol import Predictor
from moeflow.predictors.training import Progress
from moeflow.trace.format import DECODE
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.train_predictor import split_sequences

RECALL_AT = (4, 6, 8)  # reported whatever the model's top-k
_BATCH_SIZE = 16


class PredictionQuality:
    """Counts of demanded experts that were among the likeliest, by distance and layer.

    Args:
        num_layers: L.
        top_k: K, experts a token takes.
        num_distances: D, layers ahead at most; distance 0 is the prediction before the step.
    """

    def __init__(self, num_layers: int, top_k: int, num_distances: int = 1) -> None:
        self.top_k = top_k
        self.ks = tuple(sorted({*RECALL_AT, top_k, top_k + 2, top_k + 3, 2 * top_k}))
        shape = (num_distances + 1, num_layers)
        self.hits = np.zeros((*shape, len(self.ks)), np.int64)  # demanded and among the k likeliest
        self.demanded = np.zeros(shape, np.int64)
        self.tokens = np.zeros(shape, np.int64)
        self.union_hits, self.union_demanded = 0, 0  # over the tokens of a batch, a layer

    def add(self, distance: int, layer: int, probability: np.ndarray, demanded: np.ndarray) -> None:
        """Count a prediction of layers from `layer` on.

        Args:
            distance: layers from the last one observed to the one predicted; 0 before the step.
            layer: the first layer predicted.
            probability: [B, n, E]; NaN counts as predicted last.
            demanded: [B, n, E], 0 or 1; tokens that demand nothing are left out.
        """
        took_part = demanded.any((1, 2))
        probability, demanded = probability[took_part], demanded[took_part]
        order = np.argsort(-np.nan_to_num(probability, nan=-1.0), axis=2, kind="stable")[:, :, : self.ks[-1]]
        found = np.cumsum(np.take_along_axis(demanded, order, 2), 2).sum(0)  # [n, k]
        rows = slice(layer, layer + demanded.shape[1])
        self.hits[distance, rows] += found[:, [min(k, found.shape[1]) - 1 for k in self.ks]].astype(np.int64)
        self.demanded[distance, rows] += demanded.sum((0, 2)).astype(np.int64)
        self.tokens[distance, rows] += len(demanded)
        if distance == 0:
            predicted = np.zeros(demanded.shape[1:], bool)
            layers = np.arange(demanded.shape[1])[None, :, None]
            predicted[np.broadcast_to(layers, order[:, :, : self.top_k].shape), order[:, :, : self.top_k]] = True
            wanted = demanded.any(0)
            self.union_hits += int((predicted & wanted).sum())
            self.union_demanded += int(wanted.sum())

    def as_dict(self, distance: int) -> dict:
        """Return recall@k and precision@4 of all layers at a distance; None where nothing was counted."""
        hits, demanded = self.hits[distance].sum(0), int(self.demanded[distance].sum())
        figures = {f"recall@{k}": _ratio(int(hit), demanded) for k, hit in zip(self.ks, hits, strict=True)}
        for k in sorted({4, self.top_k}):
            figures[f"precision@{k}"] = _ratio(int(hits[self.ks.index(k)]), k * int(self.tokens[distance].sum()))
        return figures

    def by_layer(self, distance: int) -> list[float | None]:
        """Return recall@K of each layer at a distance."""
        hits = self.hits[distance, :, self.ks.index(self.top_k)]
        return [_ratio(int(hit), int(all_)) for hit, all_ in zip(hits, self.demanded[distance], strict=True)]

    def batch_recall(self) -> float | None:
        """Return the share of the experts demanded by any token of a batch that some token's K likeliest hold.

        It grows with the batch, and predicting all experts makes it 1. Source: ExpertFlow.
        """
        return _ratio(self.union_hits, self.union_demanded)


def evaluate_predictor(
    predictor: Predictor,
    trace: RoutingTrace,
    places: list[int] | None = None,
    *,
    batch_size: int = _BATCH_SIZE,
    progress: Progress | None = None,
) -> dict:
    """Measure a predictor on decode steps, several sequences side by side.

    Args:
        predictor: for this trace's model.
        trace: its demand counts as true.
        places: in `trace.sequences()`; those that `split_sequences` holds out when None.
        batch_size: sequences side by side.
        progress: called with the share done, 0 to 1, and a title.

    Returns:
        `all_layers` (before the step), `next_layer` (given the layers before it in the step), each with recall@k and
        precision@k; `by_distance`, `by_layer`, `batch_recall`, and the numbers of sequences and tokens.
    """
    if places is None:
        places = split_sequences(trace)[1]
    quality = PredictionQuality(trace.num_layers, trace.top_k, max(predictor.reach, 1))
    rows, is_decode = trace.sequences(), trace.phase == DECODE
    order = sorted(places, key=lambda place: int(is_decode[rows[place]].sum()))
    num_tokens = 0
    for start in range(0, len(order), batch_size):
        batch = [_Sequence(rows[place], is_decode[rows[place]]) for place in order[start : start + batch_size]]
        num_tokens += sum(len(sequence.decode) for sequence in batch)
        _follow(predictor, trace, batch, quality)
        if progress is not None:
            progress(min(1.0, (start + batch_size) / len(order)), f"evaluating {predictor.name}")
    return {
        "predictor": predictor.name,
        "sequences": len(places),
        "tokens": num_tokens,
        "all_layers": quality.as_dict(0),
        "next_layer": quality.as_dict(1),
        "by_distance": [quality.as_dict(distance) for distance in range(1, predictor.reach + 1)],
        "by_layer": quality.by_layer(0),
        "batch_recall": {"batch": batch_size, "recall": quality.batch_recall()},
    }


class _Sequence:
    """One sequence's rows, its prompt apart from its decode steps."""

    def __init__(self, rows: slice | np.ndarray, is_decode: np.ndarray) -> None:
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        self.prefill, self.decode = rows[~is_decode], rows[is_decode]


def _follow(predictor: Predictor, trace: RoutingTrace, batch: list[_Sequence], quality: PredictionQuality) -> None:
    """Run a predictor along a batch of sequences and count its predictions."""
    predictor.begin(len(batch))
    prompts = max(len(sequence.prefill) for sequence in batch)
    if prompts:
        predictor.prefill(*_gather(trace, [_padded(s.prefill, prompts, at_end=False) for s in batch])[:3])
    steps = max(len(sequence.decode) for sequence in batch)
    if not steps:
        return
    token_ids, experts, weights, recorded = _gather(trace, [_padded(s.decode, steps, at_end=True) for s in batch])
    unknown = np.full((len(batch), trace.num_layers, trace.num_experts), np.nan, np.float32)
    for t in range(steps):
        demanded = multi_hot(experts[:, t], trace.num_experts)
        before = predictor.step(token_ids[:, t])
        latest = unknown.copy() if before is None else before.copy()
        quality.add(0, 0, latest, demanded)
        for layer in range(trace.num_layers):
            if layer:
                quality.add(1, layer, latest[:, layer : layer + 1], demanded[:, layer : layer + 1])
            refined = predictor.observe(
                layer,
                experts[:, t, layer],
                None if weights is None else weights[:, t, layer],
                recorded[:, t, layer] if predictor.signal == "recorded" and recorded is not None else None,
            )
            if refined is None:
                continue
            for distance in range(1, refined.shape[1] + 1):
                target, row = layer + distance, refined[:, distance - 1]
                latest[:, target] = np.where(np.isnan(row), latest[:, target], row)
                if distance > 1:
                    quality.add(distance, target, latest[:, target : target + 1], demanded[:, target : target + 1])


def _padded(rows: np.ndarray, length: int, at_end: bool) -> np.ndarray:
    """Return [length] row numbers, -1 where padding."""
    padding = np.full(length - len(rows), -1)
    return np.concatenate([rows, padding] if at_end else [padding, rows])


def _gather(
    trace: RoutingTrace, rows: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return token ids [B, T], experts [B, T, L, K], weights and lookahead or None; padding is experts of none."""
    places = np.stack(rows)
    experts, weights, recorded = trace.experts[places], trace.weights, trace.lookahead
    experts[places < 0] = trace.none
    if recorded is not None:
        recorded = recorded[places]
        recorded[places < 0] = trace.none
    return trace.token_ids[places], experts, None if weights is None else weights[places], recorded


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
