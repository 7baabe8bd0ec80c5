"""Training predictors on a trace and measuring them on the sequences that were held out."""

from pathlib import Path

import numpy as np

from moeflow.errors import ConfigError, PredictorError
from moeflow.policy.prefetch_ledger import PredictionQuality
from moeflow.predictors.files import PredictorCard, load_predictor, save_predictor
from moeflow.predictors.markov import Markov
from moeflow.predictors.odds import multi_hot
from moeflow.predictors.path.training import train_path
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.protocol import Predictor
from moeflow.predictors.recorded import RecordedLookahead
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence.training import train_sequence
from moeflow.predictors.training import Progress, TrainingOptions
from moeflow.trace.trace import DECODE, RoutingTrace

HOLD_OUT = 5
TRAINERS = {"path": train_path, "sequence": train_sequence}
BASELINES = {"popularity": Popularity.train, "markov": Markov.train}
_BATCH_SIZE = 16


def split_sequences(trace: RoutingTrace, hold_out: int = HOLD_OUT) -> tuple[list[int], list[int]]:
    """Split a trace by sequence: of those that are not duplicates, every `hold_out`-th is held out.

    Args:
        trace: to split.
        hold_out: N: of N sequences the last is held out.

    Returns:
        Places in `trace.sequences()` of the training sequences and of those held out.

    Raises:
        ConfigError: `hold_out` below 2, or too few sequences to hold one out.
    """
    if hold_out < 2:
        raise ConfigError(f"hold_out is {hold_out}. Allowed: 2 or more; every fifth sequence is usual.")
    facts = trace.sequence_facts
    kept = [
        place
        for place, number in enumerate(trace.sequence_numbers.tolist())
        if not (number < len(facts) and facts[number].get("duplicate"))
    ]
    if len(kept) < hold_out:
        raise ConfigError(
            f"{trace.name} has {len(kept)} sequence(s), too few to hold out every {hold_out}th. "
            f"Allowed: {hold_out} or more; record more prompts, or hold out more often."
        )
    held_out = kept[hold_out - 1 :: hold_out]
    return [place for place in kept if place not in set(held_out)], held_out


def trace_routes(trace: RoutingTrace, places: list[int]) -> Routes:
    """Return these sequences of a trace as predictors learn them, prefill and decode alike."""
    rows = trace.sequences()
    weights = trace.weights
    return Routes(
        [trace.token_ids[rows[place]] for place in places],
        [trace.experts[rows[place]] for place in places],
        None if weights is None else [weights[rows[place]] for place in places],
        trace.num_experts,
    )


def train_predictor(
    trace: RoutingTrace,
    kind: str,
    out: str | Path,
    *,
    hold_out: int = HOLD_OUT,
    options: TrainingOptions | None = None,
    progress: Progress | None = None,
    **sizes,
) -> PredictorCard:
    """Train a predictor on a trace's training sequences and write its file, whole or not at all.

    Args:
        trace: to learn from.
        kind: path or sequence.
        out: the file.
        hold_out: every which sequence is left for `evaluate_predictor`.
        options: seed, epochs, device.
        progress: called with the share done, 0 to 1, and what is going on.
        sizes: of the model, by the kind's own names.

    Raises:
        ConfigError: unknown kind, a malformed option, or too few sequences.
        PredictorError: the file cannot be written.
    """
    if kind not in TRAINERS:
        raise ConfigError(f"a predictor of kind {kind!r} cannot be trained. Allowed: {', '.join(TRAINERS)}.")
    if Path(out).is_dir() or not Path(out).absolute().parent.is_dir():
        why = "it is a folder" if Path(out).is_dir() else "there is no such folder"
        raise PredictorError(f"{out} cannot be written: {why}. Give a file in a folder of yours.")
    options = options or TrainingOptions()
    places, _ = split_sequences(trace, hold_out)
    routes = trace_routes(trace, places)
    predictor = TRAINERS[kind](routes, options, progress, **sizes)
    facts = {
        "trace": Path(trace.name).name,
        "sequences": len(routes),
        "tokens": routes.num_tokens,
        "hold_out": hold_out,
    }
    return save_predictor(
        predictor, out, fingerprint=trace.fingerprint, top_k=trace.top_k, seed=options.seed, trained_on=facts
    )


def open_predictor(name: str | Path, trace: RoutingTrace) -> tuple[Predictor, int]:
    """Return a predictor for a trace and every which sequence was held out from its training.

    Args:
        name: a baseline, which is counted on the training sequences at once; lookahead, where the trace holds one; or
            a file.
        trace: whose model the predictor must be for.

    Raises:
        PredictorError: the file is missing, damaged or another model's.
        ConfigError: the trace holds no lookahead, or too few sequences.
    """
    if str(name) in BASELINES:
        return BASELINES[str(name)](trace_routes(trace, split_sequences(trace)[0])), HOLD_OUT
    if str(name) == "lookahead":
        if trace.lookahead is None:
            raise ConfigError(f"{trace.name} holds no lookahead. Record a trace of a model that has one.")
        reach, num_ranks = trace.format.lookahead
        return RecordedLookahead(trace.num_layers, trace.num_experts, trace.top_k, reach, num_ranks), HOLD_OUT
    predictor, card = load_predictor(
        name, fingerprint=trace.fingerprint, num_layers=trace.num_layers, num_experts=trace.num_experts
    )
    return predictor, int(card.trained_on.get("hold_out", HOLD_OUT))


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
        trace: the truth.
        places: in `trace.sequences()`; those that `split_sequences` holds out when None.
        batch_size: sequences side by side.
        progress: called with the share done and what is going on.

    Returns:
        `all_layers` (before the step), `next_layer` (given the layers before it in the step), each with recall@k and
        precision@k; `by_distance`, `by_layer`, `batch_recall` and what was counted.
    """
    if places is None:
        places = split_sequences(trace)[1]
    quality = PredictionQuality(trace.num_layers, trace.top_k, max(predictor.reach, 1))
    rows, is_decode = trace.sequences(), trace.phase == DECODE
    order = sorted(places, key=lambda place: int(is_decode[rows[place]].sum()))
    num_tokens = 0
    for start in range(0, len(order), batch_size):
        batch = [_Sequence(trace, rows[place], is_decode[rows[place]]) for place in order[start : start + batch_size]]
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

    def __init__(self, trace: RoutingTrace, rows, is_decode):
        rows = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        self.prefill, self.decode = rows[~is_decode], rows[is_decode]


def _follow(predictor: Predictor, trace: RoutingTrace, batch: list[_Sequence], quality: PredictionQuality) -> None:
    """Run a predictor along a batch of sequences and count how good it was."""
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


def _gather(trace: RoutingTrace, rows: list[np.ndarray]):
    """Return token ids [B, T], experts [B, T, L, K], weights and lookahead or None; padding is experts of none."""
    rows = np.stack(rows)
    padding = rows < 0

    def take(field):
        return None if field is None else field[rows]

    experts, recorded = take(trace.experts), take(trace.lookahead)
    experts[padding] = trace.none
    if recorded is not None:
        recorded[padding] = trace.none
    return take(trace.token_ids), experts, take(trace.weights), recorded
