"""Workloads for placement, from a routing trace, a recording of another program, or a file of counts."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moeflow.errors import PlacementError, TraceError
from moeflow.placement.files.counts import SUFFIXES, read_counts
from moeflow.placement.workload import Workload
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import RoutingTrace


def read_workload(path: str | Path) -> Workload:
    """Count the routes of a trace, or read a count file.

    Of a trace, every token counts but those of sequences marked as duplicates.

    Args:
        path: a trace; a folder of the gpt-oss-20b collection or a .jsonl recording, which are converted on the way; or
            a count file (.json, .npz, .npy, .pt, .csv).

    Raises:
        PlacementError: the file is missing or its counts are no workload's.
        TraceError: the trace is empty, damaged or no trace.
    """
    if is_count_file(path):
        return read_counts(path)
    with opened_routes(path) as trace:
        return counted(trace, Path(path).stem, kept_sequences(trace))


def held_out_sequences(trace: RoutingTrace, every: int) -> np.ndarray:
    """Return the numbers of every n-th sequence that is no duplicate.

    Raises:
        PlacementError: n below 2, or too few sequences.
    """
    if every < 2:
        raise PlacementError(f"every {every}th sequence cannot be held out. Give 2 or more.")
    numbers = kept_sequences(trace)
    if len(numbers) < every:
        raise PlacementError(
            f"{trace.name} has {len(numbers)} sequences that are no duplicates, and every {every}th is to be held out. "
            "Hold out more often, or give a longer trace."
        )
    return numbers[every - 1 :: every]


def split_workload(path: str | Path, every: int) -> tuple[Workload, Workload]:
    """Count a trace in two parts: of its sequences that are no duplicates, every n-th is held out.

    Args:
        path: as `read_workload`, but no count file.
        every: n; the n-th, 2n-th and so on are held out.

    Returns:
        `(in sample, held out)`.

    Raises:
        PlacementError: a count file, n below 2, or too few sequences.
        TraceError: the trace is empty, damaged or no trace.
    """
    if is_count_file(path):
        raise PlacementError(f"{path} holds counts, which cannot be split. Give a trace, or a second file to judge on.")
    with opened_routes(path) as trace:
        held_out = held_out_sequences(trace, every)
        name = Path(path).stem
        seen = counted(trace, name, np.setdiff1d(kept_sequences(trace), held_out))
        return seen, counted(trace, f"{name}, held out", held_out)


def is_count_file(path: str | Path) -> bool:
    """Return whether a path is read as a count file, by its name."""
    return Path(path).suffix.lower() in SUFFIXES and not Path(path).is_dir()


@contextmanager
def opened_routes(path: str | Path) -> Iterator[RoutingTrace]:
    """Open a trace, or convert a recording to one; the converted file is deleted when the context ends.

    Raises:
        PlacementError: nothing is there.
        TraceError: it is empty, damaged or no trace.
    """
    path = Path(path)
    if not path.exists():
        raise PlacementError(
            f"{path} is not there. Give a trace, a folder of the gpt-oss-20b collection, or a count file "
            f"({', '.join(SUFFIXES)})."
        )
    if path.is_dir() or path.suffix.lower() == ".jsonl":
        with tempfile.TemporaryDirectory(prefix="moeflow-") as folder:
            convert_trace(path, Path(folder) / "trace")
            yield RoutingTrace.open(Path(folder) / "trace")
    else:
        try:
            trace = RoutingTrace.open(path)
        except TraceError as error:
            raise TraceError(f"{error} The name of a file of counts ends in {', '.join(SUFFIXES)}.") from error
        yield trace


def kept_sequences(trace: RoutingTrace) -> np.ndarray:
    """Return the numbers of the sequences that are not marked as duplicates, ascending.

    Raises:
        PlacementError: there are none.
    """
    facts, numbers = trace.sequence_facts, trace.sequence_numbers
    kept = [number for number in numbers if not (number < len(facts) and facts[number].get("duplicate"))]
    if not kept:
        raise PlacementError(
            f"{trace.name}: all {len(numbers)} sequences are marked as duplicates. Give another trace."
        )
    return np.array(kept)


def counted(trace: RoutingTrace, name: str, sequence_numbers: np.ndarray) -> Workload:
    """Count the routes of some sequences, prefill and decode alike.

    Raises:
        PlacementError: layers have unequal numbers of experts.
    """
    if len(set(trace.experts_per_layer)) != 1:
        raise PlacementError(
            f"{trace.name}: layers have {min(trace.experts_per_layer)} to {trace.num_experts} experts. Only models "
            "whose layers have equally many can be placed."
        )
    return Workload.of_routes(name, trace.select(sequence_numbers).experts, trace.num_experts)
