"""Replay speculation on gpt-oss-20b's routes: what a gate gains that knows which experts a draft would wait for.

    python scripts/replay_speculation.py [--tokens 2000] [--cache 25 50] [--links 4 12 25 50] [--acceptance .6 .8 .9]

A simulated clock: a step takes the bytes that it reads from memory (dense weights, and the experts that its rows touch)
by the speed of memory, and the missing experts' bytes by the link's. Experts are kept least recently used, from one
sequence to the next. A draft has seven tokens; each is the true next one with the probability that is told, and behind
the first one that is not the draft goes on as some other place of the trace does. All ways meet the same drafts.

Ways: three tokens of every draft; the gate by acceptance and measured steps alone; the gate by the experts that tokens
are foreseen to miss, as the engine learns them; and the gate by those that they do miss. The classes are the engine's.
Printed are tokens a second as ratios to none. The last line is one JSON object.
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from moeflow.core import ExpertKey
from moeflow.engine.sequence import Piece, Sequence
from moeflow.engine.speculation.foreseen_waits import ForeseenWaits
from moeflow.policy.cache import ExpertCache
from moeflow.policy.speculation import Acceptance, SpeculationGate
from moeflow.policy.step_times import StepTimes
from moeflow.predictors.odds import multi_hot
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import RoutingTrace

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("none", "always three", "acceptance", "foreseen", "true")
EXPERT_BYTES, DENSE_BYTES = 13_200_000, 1_200_000_000  # of gpt-oss-20b in mxfp4, a step
MOST = 7


class Drafts:
    """Drafts behind each row of a trace, with rows of the trace as their tokens.

    Args:
        trace: of the model.
        acceptance: probability that a token is the true next one.
    """

    def __init__(self, trace: RoutingTrace, acceptance: float) -> None:
        rng = np.random.default_rng(0)
        right = rng.random((len(trace), MOST)) < acceptance
        self.num_right = np.where(right.all(axis=1), MOST, right.argmin(axis=1))
        self._others = rng.integers(0, len(trace) - MOST, len(trace))

    def rows(self, row: int, left: int) -> tuple[list[int], int]:
        """Return the rows of a draft behind a row with `left` true ones behind it, and how many of them are true."""
        most = min(MOST, left)
        num_right = min(int(self.num_right[row]), most)
        other = int(self._others[row])
        return [row + 1 + place if place < num_right else other + place for place in range(most)], num_right


class Machine:
    """Experts in a cache behind a link, and the clock.

    Args:
        trace: of the model.
        share: of all experts that fit.
        memory: bytes a second.
        link: bytes a second.
    """

    def __init__(self, trace: RoutingTrace, share: float, memory: float, link: float) -> None:
        self.experts_per_layer = [trace.num_experts] * trace.num_layers
        self.cache = ExpertCache(round(share * sum(self.experts_per_layer)), "lru")
        self.observers: list = []
        self.expert_fetch = self
        self._memory, self._link = memory, link
        self._demanded, self._waited_s = 0, 0.0

    def demanded(self) -> tuple[int, float]:
        """Return demanded experts until now, and seconds that were waited for any."""
        return self._demanded, self._waited_s

    def run(self, routes: np.ndarray) -> float:
        """Run a step whose rows take [rows, L, K]; return its seconds."""
        cache, demanded, missing = self.cache, 0, 0
        for layer in range(routes.shape[1]):
            keys = [ExpertKey(layer, expert) for expert in dict.fromkeys(routes[:, layer].ravel().tolist())]
            cache.touch(keys)
            absent = [key for key in keys if key not in cache]
            held = [key for key in keys if key in cache]
            for key in held:
                cache.pin(key)
            for key in absent:
                cache.reserve(key)
                cache.commit(key)
            for key in keys:
                cache.unpin(key)
            demanded, missing = demanded + len(keys), missing + len(absent)
        waited_s = missing * EXPERT_BYTES / self._link
        self._demanded, self._waited_s = self._demanded + demanded, self._waited_s + waited_s
        return (DENSE_BYTES + demanded * EXPERT_BYTES) / self._memory + waited_s


class TrueRoutes:
    """Stands in for likely routes: what the rows of the step that is asked about take."""

    def __init__(self) -> None:
        self.rows = np.zeros((0, 0, 0), bool)

    def likely(self, sequences: list[str], tokens: list[int]) -> np.ndarray:
        """Return [rows, L, E]."""
        return self.rows.copy()

    def observe(self, sequence: str, tokens: list[int], chosen: np.ndarray) -> None:
        """Nothing."""

    def forget(self, sequence: str) -> None:
        """Nothing."""


def replay(trace: RoutingTrace, places: list[slice], way: str, drafts: Drafts, machine: Machine, chance: float) -> dict:
    """Run sequences one after the other; return seconds, tokens, drafted tokens and the union's growth."""
    gate = SpeculationGate(StepTimes(trace.num_experts, trace.top_k), MOST)
    foreseen, known, acceptance = ForeseenWaits(machine, trace.top_k), TrueRoutes(), Acceptance()
    if way == "true":
        foreseen.likely = known
    seconds, num_tokens, num_drafted = 0.0, 0, 0
    for number, rows in enumerate(places):
        id, row = str(number), rows.start
        sequence = Sequence(id, [0], rows.stop - rows.start)
        while row < rows.stop:
            proposed, num_right = drafts.rows(row, rows.stop - 1 - row)
            foreseen.begin_step(routes=way == "foreseen" or way == "true")
            if foreseen.wanted and foreseen.costs is None:
                known.rows = multi_hot(trace.experts[[row]], trace.num_experts) > 0
                foreseen.waits([(id, int(trace.token_ids[row]))], 1)
            count = min(3, len(proposed)) if way == "always three" else 0
            if way not in ("none", "always three") and gate.wants_drafts(1) and proposed:
                chances = [acceptance.probability("told", place, chance) for place in range(len(proposed))]
                known.rows = multi_hot(trace.experts[[row, *proposed]], trace.num_experts) > 0
                waits = partial(waits_of, foreseen, id, trace.token_ids, row, proposed) if foreseen.wanted else None
                (count,) = gate.choose(1, [chances], waits)
            computed = [row, *proposed[:count]]
            step_s = machine.run(trace.experts[computed])
            accepted = min(num_right, count)
            for place in range(min(accepted + 1, count)):
                acceptance.judge("told", place, chance, accepted=place < accepted)
            if foreseen.wanted:
                tokens = trace.token_ids[computed].tolist()
                foreseen.saw([Piece(sequence, tokens[:1], True, tuple(tokens[1:]))], trace.experts[computed])
                foreseen.accept(id, accepted)
            gate.finish(1, count, 1 + accepted, foreseen.finish_step(count, step_s))
            seconds, num_tokens, num_drafted = seconds + step_s, num_tokens + 1 + accepted, num_drafted + count
            row += 1 + accepted
        foreseen.forget(id)
    union = gate.times.unions()
    return {"tokens_per_s": num_tokens / seconds, "drafted_per_token": num_drafted / num_tokens, "union": union}


def waits_of(foreseen, id: str, token_ids: np.ndarray, row: int, proposed: list[int], tokens: list[tuple[int, int]]):
    """Foresee the waits of a row and of tokens of its draft."""
    rows = [row, *(proposed[place] for _, place in tokens)]
    return foreseen.waits([(id, token) for token in token_ids[rows].tolist()], 1)


def chosen_places(trace: RoutingTrace, num_tokens: int) -> list[slice]:
    """Return rows of whole sequences that do not repeat, until there are so many tokens."""
    places, found = [], 0
    for rows, facts in zip(trace.sequences(), trace.sequence_facts, strict=True):
        length = rows.stop - rows.start
        if length < 64 or facts["duplicate"] or facts["repetition"] or not facts["finished"]:
            continue
        places.append(slice(rows.start, rows.start + min(length, num_tokens - found)))
        found += length
        if found >= num_tokens:
            break
    return places


def main(argv=None) -> None:
    """Print a line for each cache, link and acceptance, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT / "../shared/data")))
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--cache", nargs="+", type=float, default=[25, 50], help="percent of all experts that fit")
    parser.add_argument("--links", nargs="+", type=float, default=[4, 12, 25, 50], help="GB/s")
    parser.add_argument("--acceptance", nargs="+", type=float, default=[0.6, 0.8, 0.9])
    parser.add_argument("--memory", type=float, default=100, help="GB/s")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        convert_trace(arguments.data / "gpt_oss_20b", f"{scratch}/trace")
        trace = RoutingTrace.open(f"{scratch}/trace")
        places, results = chosen_places(trace, arguments.tokens), {}
        print(f"{sum(one.stop - one.start for one in places)} tokens of {len(places)} sequences; ratios to no drafts")
        print("cache link acceptance  " + "  ".join(WAYS[1:]) + "   (drafted tokens a token)")
        for share in arguments.cache:
            for link in arguments.links:
                for chance in arguments.acceptance:
                    found = {}
                    for way in WAYS:
                        machine = Machine(trace, share / 100, arguments.memory * 1e9, link * 1e9)
                        found[way] = replay(trace, places, way, Drafts(trace, chance), machine, chance)
                    base = found["none"]["tokens_per_s"]
                    told = "  ".join(
                        f"{found[way]['tokens_per_s'] / base:6.3f} ({found[way]['drafted_per_token']:.2f})"
                        for way in WAYS[1:]
                    )
                    print(f"{share:4.0f}% {link:4.0f} {chance:10.1f}  {told}", flush=True)
                    results[f"{share}% {link} {chance}"] = found
    print(json.dumps(results))


if __name__ == "__main__":
    main()
