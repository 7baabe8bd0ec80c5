"""Replay of demand-only eviction policies over recorded routing: hits of a cache of a given size.

One event is one layer of one token. A hit is an expert that is resident when the token reaches the layer; then
the experts it demands are resident, and this event does not evict them. Within an event experts are taken by rising
number: that order decides ties. Nothing is prefetched and nothing costs time.
"""

import math
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_uint64
from functools import partial
from typing import NamedTuple

import numpy as np

from moeflow.c_library import c_function
from moeflow.errors import ConfigError
from moeflow.replay.demand_loop import replay_loop
from moeflow.trace.trace import RoutingTrace

# In the order of the enum in _replay.c.
_MOST = 2**31 - 1  # rows, and experts of all layers: the loop numbers them in 32 bits
REPLAY_POLICIES = ("lru", "lfu", "lfru", "static", "popularity", "belady", "random")


class Replay(NamedTuple):
    """Hits and accesses of one policy.

    Args:
        layer_hits: [L].
        layer_accesses: [L], experts demanded.
    """

    layer_hits: np.ndarray
    layer_accesses: np.ndarray

    @property
    def hits(self) -> int:
        return int(self.layer_hits.sum())

    @property
    def accesses(self) -> int:
        return int(self.layer_accesses.sum())

    @property
    def hit_rate(self) -> float:
        return self.hits / self.accesses


def replay(
    experts: np.ndarray,
    num_experts: int,
    starts: np.ndarray,
    num_slots: int,
    policy: str,
    *,
    per_layer: bool = False,
    warm: bool = False,
    seed: int = 0,
) -> Replay:
    """Replay one policy over recorded routing.

    Args:
        experts: [N, L, K], expert numbers in any order; numbers outside 0 to num_experts - 1, as padding has them,
            and an expert named twice by one event stand for none.
        num_experts: E, of one layer.
        starts: [S + 1], rows at which sequences start, and the end of the last.
        num_slots: of one pool for all layers, or of each layer's own pool where per_layer.
        policy: a name in `REPLAY_POLICIES`.
        per_layer: whether each layer has a pool of its own.
        warm: whether a sequence starts with the experts that the one before it left, instead of none.
        seed: of the random policy.

    Returns:
        Hits and accesses by layer.

    Raises:
        ConfigError: an unknown policy, fewer slots than one event demands, routes that are not whole numbers [N, L, K]
            of 1 to 65,535 experts, malformed starts, or nothing to replay.
    """
    experts, starts = np.asarray(experts), np.ascontiguousarray(starts, np.int64)
    _check(experts, starts, num_slots, policy)
    return _replay(_in_order(experts, num_experts), num_experts, starts, num_slots, policy, per_layer, warm, seed)


def replay_trace(
    trace: RoutingTrace,
    residencies: Sequence[float],
    policies: Sequence[str],
    *,
    per_layer: bool = False,
    warm: bool = False,
    phase: str = "decode",
    seed: int = 0,
) -> list[dict]:
    """Replay every policy at every residency.

    Args:
        trace: the routing.
        residencies: percent of all experts.
        policies: names in `REPLAY_POLICIES`.
        per_layer: whether each layer has a pool of its own.
        warm: whether a sequence starts with the experts that the one before it left.
        phase: "decode", or "all" for prompts too, token by token (a live prefill demands each expert once instead).
        seed: of the random policy.

    Returns:
        Rows of policy, residency, slots, hit_rate, hits and accesses; policies outermost, in the order given.

    Raises:
        ConfigError: an unknown name or phase, a residency under one layer's top-k, or nothing to replay.
    """
    sizes = [
        slots_of(residency, trace.experts_per_layer, trace.top_k, per_layer=per_layer) for residency in residencies
    ]
    experts, starts = sequence_rows(trace, phase)
    rows, ordered = [], None
    for policy in policies:
        for residency, num_slots in zip(residencies, sizes, strict=True):
            _check(experts, starts, num_slots, policy)
            ordered = _in_order(experts, trace.num_experts) if ordered is None else ordered
            result = _replay(ordered, trace.num_experts, starts, num_slots, policy, per_layer, warm, seed)
            slots = sum(min(num_slots, n) for n in trace.experts_per_layer) if per_layer else num_slots
            rows.append(
                {
                    "policy": policy,
                    "residency": residency,
                    "slots": slots,
                    "hit_rate": result.hit_rate,
                    "hits": result.hits,
                    "accesses": result.accesses,
                }
            )
    return rows


def sequence_rows(trace: RoutingTrace, phase: str = "decode") -> tuple[np.ndarray, np.ndarray]:
    """Return a trace's routes sequence after sequence: experts [N, L, K], and starts [S + 1].

    Raises:
        ConfigError: an unknown phase, or no rows of it.
    """
    if phase not in ("decode", "all"):
        raise ConfigError(f"phase {phase!r} is unknown. Allowed: decode, all.")
    chosen = trace.decode() if phase == "decode" else trace
    if not len(chosen):
        raise ConfigError(f"{trace.name} has no decode rows. Give --phase all to replay its prompts.")
    numbers = np.arange(len(chosen))
    groups = [numbers[rows] for rows in chosen.sequences()]
    return chosen.experts[np.concatenate(groups)], np.cumsum([0, *map(len, groups)])


def slots_of(residency: float, experts_per_layer: tuple[int, ...], top_k: int, *, per_layer: bool = False) -> int:
    """Return how many slots a residency buys, rounded down: in all, or of the largest layer where per_layer.

    Args:
        residency: percent of all experts.
        experts_per_layer: [L].
        top_k: K, experts one layer demands at once.
        per_layer: whether each layer has a pool of its own.

    Raises:
        ConfigError: not above 0 and at most 100, or under one layer's top-k.
    """
    if not 0 < residency <= 100:
        raise ConfigError(f"a residency of {residency:g} % is out of range: give percent above 0 and at most 100.")
    num_keys = max(experts_per_layer) if per_layer else sum(experts_per_layer)
    num_slots = math.floor(residency * num_keys / 100 + 1e-9)  # 32.3 % of 1000 is 323, whatever binary fractions say
    if num_slots < top_k:
        minimum = math.ceil(10000 * top_k / num_keys) / 100
        where = " a layer" if per_layer else ""
        raise ConfigError(
            f"a residency of {residency:g} % is {num_slots} slots{where}, fewer than the {top_k} experts that one "
            f"layer demands at once. The minimum is {minimum:g} %."
        )
    return num_slots


def _check(experts: np.ndarray, starts: np.ndarray, num_slots: int, policy: str) -> None:
    """Refuse an unknown policy, malformed starts, an empty trace and too few slots."""
    if policy not in REPLAY_POLICIES:
        raise ConfigError(f"policy {policy!r} is unknown. Allowed: {', '.join(REPLAY_POLICIES)}.")
    if experts.ndim != 3 or experts.dtype.kind not in "iu":
        raise ConfigError(
            f"experts are {experts.dtype} {list(experts.shape)}. Give whole numbers [rows, layers, experts a token]."
        )
    if (
        starts.ndim != 1
        or (np.diff(starts) < 0).any()
        or (len(starts) and not 0 <= starts[0] <= starts[-1] <= len(experts))
    ):
        raise ConfigError(
            f"starts must be rows in rising order within 0 to {len(experts)}, found {starts.tolist()[:8]}."
        )
    if len(starts) < 2 or starts[0] == starts[-1] or 0 in experts.shape:
        raise ConfigError("the trace is empty: there is nothing to replay. Record or convert one with routing in it.")
    top_k = experts.shape[2]
    if num_slots < top_k:
        raise ConfigError(
            f"{num_slots} slots are fewer than the {top_k} experts that one layer demands at once. The minimum is "
            f"{top_k}."
        )


def _in_order(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Return experts as contiguous uint16, rising within an event, with num_experts and nothing else for none."""
    if not 1 <= num_experts < 2**16:
        raise ConfigError(f"{num_experts} experts a layer cannot be replayed. Allowed: 1 to {2**16 - 1}.")
    if max(len(experts), experts.shape[1] * num_experts) > _MOST:
        raise ConfigError(
            f"{len(experts)} rows of {experts.shape[1]} layers with {num_experts} experts are too many. Allowed: "
            f"{_MOST} rows, {_MOST} experts in all layers."
        )
    ordered = np.where((experts < 0) | (experts >= num_experts), np.uint16(num_experts), experts).astype(np.uint16)
    ordered.sort(axis=-1)
    again = ordered[..., 1:] == ordered[..., :-1]
    ordered[..., 1:][again] = num_experts
    return ordered


def _replay(
    ordered: np.ndarray,
    num_experts: int,
    starts: np.ndarray,
    num_slots: int,
    policy: str,
    per_layer: bool,
    warm: bool,
    seed: int,
) -> Replay:
    """Replay rows that `_check` has passed and `_in_order` has sorted."""
    loop = _compiled_loop() or replay_loop
    num_layers, top_k = ordered.shape[1:]
    # Further slots stay empty, and no expert is ever evicted.
    num_slots = min(num_slots, max(num_experts * (1 if per_layer else num_layers), top_k))
    # A static cache fixes all slots but one event's and one in flight, as the live one does.
    options = {"warm": warm, "num_fixed": num_slots - top_k - 1, "seed": seed}
    if not per_layer:
        result = Replay(*loop(ordered, num_experts, starts, num_slots, policy, **options))
    else:
        layers = [np.ascontiguousarray(ordered[:, [layer]]) for layer in range(ordered.shape[1])]
        replays = [loop(layer, num_experts, starts, num_slots, policy, **options) for layer in layers]
        result = Replay(*(np.concatenate(counts) for counts in zip(*replays, strict=True)))
    if not result.accesses:
        raise ConfigError("the trace demands no expert at all: every number in it stands for none.")
    return result


def _compiled_loop() -> Callable[..., tuple[np.ndarray, np.ndarray]] | None:
    """Return the compiled loop, called like `replay_loop`; None where it was not built."""
    words, counts = np.ctypeslib.ndpointer(np.uint16, flags="C"), np.ctypeslib.ndpointer(np.int64, flags="C")
    function = c_function(
        "replay", __file__,
        (words, c_int64, c_int, c_int, counts, c_int64, *[c_int] * 4, c_uint64, counts, counts), c_int,
        without="replays run in Python, about a hundred times slower",
    )  # fmt: skip
    return None if function is None else partial(_run_compiled, function)


def _run_compiled(
    function: Callable[..., int],
    experts: np.ndarray,
    num_experts: int,
    starts: np.ndarray,
    num_slots: int,
    policy: str,
    *,
    warm: bool,
    num_fixed: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    num_layers, top_k = experts.shape[1:]
    hits, accesses = np.zeros(num_layers, np.int64), np.zeros(num_layers, np.int64)
    failed = function(
        experts, num_layers, top_k, num_experts, starts, len(starts) - 1, num_slots,
        REPLAY_POLICIES.index(policy), warm, num_fixed, seed % 2**64, hits, accesses,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to replay {len(experts)} rows")
    return hits, accesses
