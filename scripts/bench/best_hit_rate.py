"""The best hit rate that recorded routes allow, replayed as a running model demands them."""

from pathlib import Path


def best_hit_rate(trace: Path, num_slots: int, rounds: int, policy: str = "belady") -> float:
    """Replay a generation again and again, its prompt as one event a layer, and count hits of its decode steps.

    Args:
        trace: of one generation.
        num_slots: of one pool for all layers.
        rounds: how often the generation is repeated and counted, behind a first one that fills the slots.
        policy: a name in `moeflow.replay.demand_loop.SCORES`; "belady" knows all rounds that come.

    Returns:
        Hits of all that the decode steps of the rounds demand.
    """
    import numpy as np

    from moeflow.replay.demand_loop import ReplayCache, _next_rows
    from moeflow.trace.trace import RoutingTrace

    routes = RoutingTrace.open(trace)
    decode = len(routes.decode())
    num_layers, num_experts = routes.num_layers, routes.num_experts
    experts = np.asarray(routes.experts)

    def demanded(rows, layer: int) -> list[int]:
        return [int(number) for number in np.unique(rows[:, layer]) if number < num_experts]

    blocks = [experts[: len(experts) - decode], *(experts[[row]] for row in range(len(experts) - decode, len(experts)))]
    generation = [[demanded(rows, layer) for layer in range(num_layers)] for rows in blocks]
    events = generation * (rounds + 1)
    none = np.zeros((num_layers, num_experts), np.int64)
    cache = ReplayCache(num_layers, num_slots, policy, num_fixed=0, popularity=none, seed=0)
    hits = accesses = 0
    for number, (row, next_rows) in enumerate(zip(events, _next_rows(events), strict=True)):
        for layer, wanted in enumerate(row):
            found = cache.run_event(layer, wanted, next_rows[layer])
            if number >= len(generation) and number % len(generation):
                hits, accesses = hits + found, accesses + len(wanted)
    return hits / accesses
