"""The annealing's inner loop in plain Python: the meaning of each change of a placement, the oracle of `_anneal.c`, and
the fallback, a hundred times slower, for an installation without a compiler.

Knows the arrays of an `Annealing`. Knows nothing of problems, temperatures or plans.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from moeflow.placement.solvers.anneal import Annealing
    from moeflow.placement.tables import Tables


class Change(NamedTuple):
    """A copy of an expert leaves one GPU or joins another, or both: -1 means none."""

    expert: int
    leaves: int
    joins: int


def anneal(problem: "Tables", state: "Annealing", num_proposals: int, temperature: float) -> int:
    """Try changes at one temperature; return how many were kept.

    A change is one of three: two copies change places; a copy moves into a free slot; where replicas may change,
    another expert takes the place of a copy that is not its expert's last. It is kept if it costs less, else with
    probability exp(-cost / temperature).

    Args:
        problem: `tables.Tables`.
        state: `anneal.Annealing`'s arrays, changed in place.
        num_proposals: how many changes to try.
        temperature: seconds.
    """
    kept = 0
    for _ in range(num_proposals):
        proposal = _propose(problem, state)
        if proposal is None:
            continue
        layer, first, second, i, j = proposal
        changes = [first] if second is None else [first, second]
        delta, after = 0.0, []
        for w, weight in enumerate(problem.weights.tolist()):
            now = state.busy_s[w, layer].tolist()
            busy = list(now)
            for change in changes:
                _add_seconds(problem, state, w, layer, change, busy)
            after.append(busy)
            delta += weight * (max(busy) - max(now))
        if problem.traffic is not None:
            for change in changes:
                delta += _traffic_change(problem, state, layer, change)
        shares = [_share_change(state, layer, change) for change in changes] if problem.transitions is not None else []
        if shares:
            delta += _slowest_change(problem, state, layer, changes, shares)
        if delta > 0 and not delta < -temperature * math.log(state.random.unit()):
            continue
        kept += 1
        for w, busy in enumerate(after):
            state.busy_s[w, layer] = busy
        if problem.traffic is not None:
            for change in changes:
                _spread_traffic(problem, state, layer, change)
        if shares:
            _spread_flow(problem, state, layer, changes, shares)
        for change in changes:
            _move_copy(state, layer, change)
        if j is not None:
            state.copy_gpu[layer, i], state.copy_gpu[layer, j] = first.joins, first.leaves
        elif second is not None:
            state.copy_expert[layer, i] = second.expert
        else:
            state.copy_gpu[layer, i] = first.joins
            state.used[layer, first.leaves] -= 1
            state.used[layer, first.joins] += 1
    return kept


def _propose(problem, state) -> tuple[int, Change, Change | None, int, int | None] | None:
    """Draw a change: (layer, first, second or None, place of the copy, place of the other copy or None), or None."""
    num_layers, num_copies = state.copy_expert.shape
    _, num_experts, num_gpus = state.holds.shape
    layer, kind, i = state.random.below(num_layers), state.random.below(4), state.random.below(num_copies)
    expert, gpu = int(state.copy_expert[layer, i]), int(state.copy_gpu[layer, i])
    holds = state.holds[layer]
    if kind == 0 and problem.may_replicate:
        other = state.random.below(num_experts)
        if state.num_copies[layer, expert] < 2 or holds[other, gpu]:
            return None
        return layer, Change(expert, gpu, -1), Change(other, -1, gpu), i, None
    if kind == 1 and problem.free_slots > 0:
        joins = state.random.below(num_gpus)
        if state.used[layer, joins] >= problem.slots[joins] or holds[expert, joins]:
            return None
        return layer, Change(expert, gpu, joins), None, i, None
    j = state.random.below(num_copies)
    other, joins = int(state.copy_expert[layer, j]), int(state.copy_gpu[layer, j])
    if holds[expert, joins] or holds[other, gpu]:
        return None
    return layer, Change(expert, gpu, joins), Change(other, joins, gpu), i, j


def _copies_after(state, layer, change) -> tuple[int, int]:
    before = int(state.num_copies[layer, change.expert])
    return before, before - (change.leaves >= 0) + (change.joins >= 0)


def _add_seconds(problem, state, workload, layer, change, busy) -> None:
    """Apply a change to each GPU's seconds in `busy`."""
    expert, (before, after) = change.expert, _copies_after(state, layer, change)
    if before == after:
        busy[change.leaves] -= problem.copy_seconds(workload, layer, expert, before, change.leaves)
        busy[change.joins] += problem.copy_seconds(workload, layer, expert, after, change.joins)
        return
    for gpu, held in enumerate(state.holds[layer, expert].tolist()):
        if held:
            busy[gpu] -= problem.copy_seconds(workload, layer, expert, before, gpu)
        if (held and gpu != change.leaves) or gpu == change.joins:
            busy[gpu] += problem.copy_seconds(workload, layer, expert, after, gpu)


def _share_change(state, layer, change) -> list[float]:
    """Return [G], the change in an expert's shares of tokens."""
    before, after = _copies_after(state, layer, change)
    out = []
    for gpu, held in enumerate(state.holds[layer, change.expert].tolist()):
        was = 1.0 / before if held else 0.0
        now = 1.0 / after if (held and gpu != change.leaves) or gpu == change.joins else 0.0
        out.append(now - was)
    return out


def _traffic_change(problem, state, layer, change) -> float:
    pull = state.pull_s[layer, change.expert].tolist()
    if change.leaves >= 0 and change.joins >= 0:
        return (pull[change.joins] - pull[change.leaves]) / int(state.num_copies[layer, change.expert])
    total = 0.0
    for share, seconds in zip(_share_change(state, layer, change), pull, strict=True):
        total += share * seconds
    return total


def _spread_traffic(problem, state, layer, change) -> None:
    """Update what the traffic with this expert costs the experts of the layers on both sides, on each GPU."""
    shares, num_layers = _share_change(state, layer, change), len(state.num_copies)
    for other in (layer + 1, layer - 1):
        if not 0 <= other < num_layers:
            continue
        after = other > layer
        reach = [0.0] * len(shares)
        for gpu in range(len(shares)):
            for source, share in enumerate(shares):
                if share != 0:
                    reach[gpu] += share * float(problem.distance[(source, gpu) if after else (gpu, source)])
        row = problem.traffic[layer, change.expert] if after else problem.traffic_back[other, change.expert]
        state.pull_s[other] += row[:, None] * reach


def _flow_after(state, workload, link, layer, changes, shares) -> np.ndarray:
    """Return [G, G], the shares of a link's transitions after changes in the layer before it or after it."""
    flow = state.flow[workload, link].copy()
    for change, share in zip(changes, np.array(shares), strict=True):
        if layer > link:
            flow += state.inflow[workload, layer, change.expert][:, None] * share
        else:
            flow += share[:, None] * state.outflow[workload, layer, change.expert]
    return flow


def _links(state, layer) -> list[int]:
    """Return the links beside a layer: before it and after it."""
    return [link for link in (layer - 1, layer) if 0 <= link < state.slowest_s.shape[1]]


def _slowest_change(problem, state, layer, changes, shares) -> float:
    total = 0.0
    for w, weight in enumerate(problem.weights.tolist()):
        change = 0.0
        for link in _links(state, layer):
            slowest = (_flow_after(state, w, link, layer, changes, shares) * problem.crossing_s).max()
            change += float(slowest) - float(state.slowest_s[w, link])
        total += weight * change
    return total


def _spread_flow(problem, state, layer, changes, shares) -> None:
    """Update the flows beside a layer, and the inflow and outflow of the layers on both sides."""
    for w in range(len(problem.weights)):
        for link in _links(state, layer):
            state.flow[w, link] = _flow_after(state, w, link, layer, changes, shares)
            state.slowest_s[w, link] = (state.flow[w, link] * problem.crossing_s).max()
            for change, share in zip(changes, np.array(shares), strict=True):
                if layer > link:
                    row = problem.transitions_back[w, link, change.expert]
                    state.outflow[w, link] += row[:, None] * share
                else:
                    state.inflow[w, layer + 1] += problem.transitions[w, link, change.expert][:, None] * share


def _move_copy(state, layer, change) -> None:
    if change.leaves >= 0:
        state.holds[layer, change.expert, change.leaves] = 0
    if change.joins >= 0:
        state.holds[layer, change.expert, change.joins] = 1
    state.num_copies[layer, change.expert] += (change.joins >= 0) - (change.leaves >= 0)
