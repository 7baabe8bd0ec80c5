"""Cost of a trace on a machine, a row for each policy and residency: on demand, predicted, foreseen.

On demand nothing is copied while a layer computes, so the hits that the compiled replay counts decide the time; with
prediction the live cache and prefetcher run on a simulated link.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from moeflow.errors import ConfigError
from moeflow.predictors.protocol import Predictor
from moeflow.replay.best_order import least_time_s, replay_best_order
from moeflow.replay.clairvoyant import NUM_STEPS as CLAIRVOYANT_STEPS
from moeflow.replay.clairvoyant import Clairvoyant
from moeflow.replay.demand import REPLAY_POLICIES, replay, sequence_rows, slots_of
from moeflow.replay.link import STEPS_AHEAD, LinkModel, replay_link
from moeflow.trace.format import DECODE
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.train_predictor import open_predictor, split_sequences

FORECAST, BEST_ORDER = "forecast", "best-order"
MACHINE_POLICIES = (*REPLAY_POLICIES, FORECAST, BEST_ORDER)
_UNTRAINED = ("clairvoyant", "lookahead")  # predictors that learn from no sequence of the trace


def replay_machine(
    trace: RoutingTrace,
    residency: float,
    policy: str,
    link: LinkModel,
    *,
    predictor: str | Path | None = None,
    places: Iterable[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict:
    """Replay one policy at one residency, each sequence's decode steps from a cold cache.

    Args:
        trace: the routing.
        residency: percent of all experts.
        policy: a name in `REPLAY_POLICIES`, on demand; "forecast", by a predictor; "best-order", the bound with perfect
            routes.
        link: the machine.
        predictor: of "forecast": a name or file as `open_predictor` takes it, or "clairvoyant".
        places: in `trace.sequences()`; all when None.
        progress: called with (tokens done, tokens in all), where that is slow.

    Returns:
        policy, residency, slots, hit_rate, hits, accesses, late, misses, tokens, tokens_per_s, share (of the speed
        with everything resident); of "forecast" also predictor and prefetch, the account; of "best-order" also
        share_at_most, which no order of copies passes.

    Raises:
        ConfigError: an unknown policy, a residency under one layer's top-k, no predictor, or nothing to replay.
        PredictorError: the predictor is of another model or answers with something that is no probability.
    """
    check_policy(policy, predictor)
    num_slots = slots_of(residency, trace.experts_per_layer, trace.top_k)
    places = list(range(len(trace.sequences())) if places is None else places)
    if policy == FORECAST:
        assert predictor is not None, "check_policy refuses a forecast without a predictor"
        found = _forecast(trace, num_slots, link, predictor, places, progress)
    else:
        chosen = trace.select(trace.sequence_numbers[places])
        experts, starts = sequence_rows(chosen)
        if policy == BEST_ORDER:
            found = _best_order(trace, experts, starts, num_slots, link)
        else:
            result = replay(experts, trace.num_experts, starts, num_slots, policy)
            misses = result.accesses - result.hits
            seconds = len(experts) * trace.num_layers * link.layer_s + misses * link.copy_s
            found = {"hits": result.hits, "accesses": result.accesses, "late": 0, "misses": misses}
            found |= _speed(trace, len(experts), seconds, link)
    first = {
        "policy": policy,
        "residency": residency,
        "slots": num_slots,
        "hit_rate": found["hits"] / found["accesses"],
    }
    return first | found


def check_policy(policy: str, predictor: str | Path | None) -> None:
    """Refuse an unknown policy, and prediction without a predictor.

    Raises:
        ConfigError: the message lists what is allowed.
    """
    if policy not in MACHINE_POLICIES:
        raise ConfigError(f"policy {policy!r} is unknown. Allowed: {', '.join(MACHINE_POLICIES)}.")
    if policy == FORECAST and predictor is None:
        raise ConfigError('policy "forecast" evicts by prediction: give a predictor.')


def replayed_places(
    trace: RoutingTrace, predictor: str | Path | None, hold_out: int | None, limit: int | None = None
) -> list[int]:
    """Return the places of the sequences to replay: all, or those held out of a predictor's training; at most `limit`.

    Args:
        predictor: as `replay_machine` takes it; sequences that it learned from are never replayed.
        hold_out: N: every N-th sequence is held out; as the predictor was trained when None.

    Raises:
        ConfigError: another hold_out than the predictor was trained with, a limit below 1, or too few sequences.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} sequences replays nothing. Give at least 1.")
    if predictor is not None and str(predictor) not in _UNTRAINED:
        trained = open_predictor(predictor, trace)[1]
        if hold_out not in (None, trained):
            raise ConfigError(
                f"{predictor} was trained with every {trained}th sequence held out, and every {hold_out}th would be "
                f"replayed: it knows some of those. Give {trained}, or train another."
            )
        hold_out = trained
    places = list(range(len(trace.sequences()))) if hold_out is None else split_sequences(trace, hold_out)[1]
    return places[:limit]


def _forecast(
    trace: RoutingTrace,
    num_slots: int,
    link: LinkModel,
    name: str | Path,
    places: list[int],
    progress: Callable[[int, int], None],
) -> dict:
    predictor: Predictor
    if str(name) == "clairvoyant":
        numbers = np.arange(len(trace))
        rows = [numbers[trace.sequences()[place]] for place in places]
        sequences = [trace.experts[some[trace.phase[some] == DECODE]] for some in rows]
        predictor, num_steps = Clairvoyant(sequences, trace.num_experts), CLAIRVOYANT_STEPS + 1
    else:
        predictor, num_steps = open_predictor(name, trace)[0], STEPS_AHEAD
    found = replay_link(
        trace,
        num_slots,
        link,
        policy=FORECAST,
        predictor=predictor,
        sequences=places,
        num_steps=num_steps,
        progress=progress,
    )
    return {name: found[name] for name in found if name not in ("policy", "slots", "hit_rate")}


def _best_order(trace: RoutingTrace, experts: np.ndarray, starts: np.ndarray, num_slots: int, link: LinkModel) -> dict:
    found: dict[str, float] = dict.fromkeys(("seconds", "accesses", "hits", "late", "misses"), 0)
    least_s = 0.0
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        rows = experts[start:end]
        run = replay_best_order(rows, trace.num_experts, num_slots, link)
        found = {name: found[name] + run[name] for name in found}
        belady = replay(rows, trace.num_experts, np.array([0, len(rows)]), num_slots, "belady")
        least_s += least_time_s(len(rows), trace.num_layers, belady.accesses - belady.hits, link)
    speed = _speed(trace, len(experts), found.pop("seconds"), link)
    return found | speed | {"share_at_most": _speed(trace, len(experts), least_s, link)["share"]}


def _speed(trace: RoutingTrace, num_tokens: int, seconds: float, link: LinkModel) -> dict:
    compute_s = num_tokens * trace.num_layers * link.layer_s
    return {"tokens": num_tokens, "tokens_per_s": num_tokens / seconds, "share": compute_s / seconds}
