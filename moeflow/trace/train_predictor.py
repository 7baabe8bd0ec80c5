"""Training of predictors on a trace, less the sequences that are held out, and opening one for a trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeflow.atomic_file import check_target
from moeflow.errors import ConfigError, PredictorError
from moeflow.predictors.files import PredictorCard, load_predictor, save_predictor
from moeflow.predictors.markov import Markov
from moeflow.predictors.path.training import train_path
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.protocol import Predictor
from moeflow.predictors.recorded import RecordedLookahead
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence.training import train_sequence
from moeflow.predictors.training import Progress, TrainingOptions
from moeflow.trace.trace import RoutingTrace

HOLD_OUT = 5
TRAINERS: dict[str, Callable[..., Predictor]] = {"path": train_path, "sequence": train_sequence}
BASELINES: dict[str, Callable[[Routes], Predictor]] = {"popularity": Popularity.train, "markov": Markov.train}


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
    **sizes: Any,
) -> PredictorCard:
    """Train a predictor on a trace's training sequences and write its file, whole or not at all.

    Args:
        trace: to learn from.
        kind: path or sequence.
        out: the file.
        hold_out: N: every N-th sequence is held out for evaluation.
        options: seed, epochs, device.
        progress: called with the share done, 0 to 1, and a title.
        sizes: of the model, by the kind's own names.

    Raises:
        ConfigError: unknown kind, a malformed option, or too few sequences.
        PredictorError: the file cannot be written.
    """
    if kind not in TRAINERS:
        raise ConfigError(f"a predictor of kind {kind!r} cannot be trained. Allowed: {', '.join(TRAINERS)}.")
    check_target(out, PredictorError)
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
    """Return a predictor for a trace, and N where every N-th sequence was held out of its training.

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
        if trace.format.lookahead is None:
            raise ConfigError(f"{trace.name} holds no lookahead. Record a trace of a model that has one.")
        reach, num_ranks = trace.format.lookahead
        return RecordedLookahead(trace.num_layers, trace.num_experts, trace.top_k, reach, num_ranks), HOLD_OUT
    predictor, card = load_predictor(
        name, fingerprint=trace.fingerprint, num_layers=trace.num_layers, num_experts=trace.num_experts
    )
    return predictor, int(card.trained_on.get("hold_out", HOLD_OUT))
