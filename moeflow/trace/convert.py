"""Conversion of routing recorded by other programs into a trace.

Two forms are read: a folder of the gpt-oss-20b collection (one .npz and sequences.json), and JSON lines, one token a
line. Needs numpy, not torch.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeflow.atomic_file import atomic_file
from moeflow.errors import TraceError
from moeflow.trace.format import DECODE, TraceFormat
from moeflow.trace.writer import TraceWriter

GPT_OSS_20B = "openai/gpt-oss-20b"
_GPT_OSS_EXPERTS = 32
_GPT_OSS_FACTS = ("dataset", "category", "prompt_tokens", "finished", "repetition", "duplicate")
_ROWS_AT_ONCE = 8192
# What numpy, zipfile and json raise for damaged files; a RecursionError is a RuntimeError.
_DAMAGES = (
    OSError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def convert_trace(
    source: str | Path, out: str | Path, *, fingerprint: str | None = None, num_experts: int | None = None
) -> int:
    """Write the trace of a recording in another form. The file is written whole or not at all.

    Args:
        source: a folder with one .npz and sequences.json, or a .jsonl file.
        out: the trace to write, which must not exist.
        fingerprint: which model; the folder's is openai/gpt-oss-20b, a JSONL file's is its name.
        num_experts: experts a layer, for JSONL; one more than the largest id when None.

    Returns:
        How many tokens were written.

    Raises:
        TraceError: the source is missing, of another form or damaged, or `out` exists or cannot be written.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise TraceError(f"{out} exists already. Give another name, or delete it.")
    if not source.exists():
        raise TraceError(f"{source} is not there. Give a folder with an .npz and sequences.json, or a .jsonl file.")
    with atomic_file(out, TraceError) as partial:
        if source.is_dir():
            return _convert_gpt_oss(source, partial, fingerprint or GPT_OSS_20B)
        return _convert_lines(source, partial, fingerprint or source.stem, num_experts)


def _convert_gpt_oss(folder: Path, out: Path, fingerprint: str) -> int:
    """Rows are decode steps; the first of a sequence feeds the last token of its prompt."""
    sequences, arrays = _read_gpt_oss(folder)
    experts, starts, lengths = arrays["expert_ids"], arrays["seq_start"], arrays["seq_len"]
    sequence = np.repeat(np.arange(len(starts), dtype=np.uint32), lengths)
    order = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    format = TraceFormat(
        (_GPT_OSS_EXPERTS,) * experts.shape[1],
        experts.shape[2],
        fingerprint,
        source=f"converted from {folder.name}: decode steps, token ids are anonymous",
    )
    facts = [{name: entry.get(name) for name in _GPT_OSS_FACTS} for entry in sequences]
    with TraceWriter(out, format, sequence_facts=facts) as writer:
        for begin in range(0, len(order), _ROWS_AT_ONCE):
            places = order[begin : begin + _ROWS_AT_ONCE]
            rows = writer.new_rows(len(places))
            rows["experts"], rows["weights"] = experts[places], arrays["weights"][places]
            rows["token_id"] = arrays["token_index"][places]
            rows["sequence"], rows["phase"] = sequence[begin : begin + _ROWS_AT_ONCE], DECODE
            writer.write(rows)
    return len(order)


def _read_gpt_oss(folder: Path) -> tuple[list[dict], dict[str, np.ndarray]]:
    archives, facts = sorted(folder.glob("*.npz")), folder / "sequences.json"
    if len(archives) != 1 or not facts.is_file():
        raise TraceError(
            f"{folder} has {len(archives)} .npz files and {'a' if facts.is_file() else 'no'} sequences.json. "
            "Give a folder with one of each."
        )
    names = ("expert_ids", "weights", "token_index", "seq_start", "seq_len")
    try:
        sequences = json.loads(facts.read_bytes())
        with np.load(archives[0]) as archive:  # never pickled objects
            arrays = {name: archive[name] for name in names}
    except KeyError as error:
        raise TraceError(f"{archives[0]} lacks an array: {error}. It must hold {', '.join(names)}.") from None
    except _DAMAGES as error:
        raise TraceError(f"{folder} cannot be read ({error}). Copy it again.") from error
    experts, starts, lengths = arrays["expert_ids"], arrays["seq_start"], arrays["seq_len"]
    wrong = None
    if any(arrays[name].dtype.kind not in "iu" for name in names if name != "weights"):
        wrong = "an array of numbers is not of whole numbers"
    elif arrays["weights"].dtype.kind != "f":
        wrong = f"weights are {arrays['weights'].dtype}, not floating-point numbers"
    elif experts.ndim != 3 or not experts.size:
        wrong = f"expert_ids has the shape {list(experts.shape)}, not [tokens, layers, ranks]"
    elif arrays["weights"].shape != experts.shape or arrays["token_index"].shape != experts.shape[:1]:
        wrong = "expert_ids, weights and token_index are of different lengths"
    elif experts.max() >= _GPT_OSS_EXPERTS or experts.min() < 0:
        wrong = f"expert ids reach from {experts.min()} to {experts.max()}, and gpt-oss-20b has {_GPT_OSS_EXPERTS}"
    elif (
        starts.ndim != 1
        or starts.shape != lengths.shape
        or (starts < 0).any()
        or (lengths < 0).any()
        or (starts + lengths > len(experts)).any()
    ):
        wrong = "seq_start and seq_len point outside the tokens"
    elif not isinstance(sequences, list) or not all(isinstance(entry, dict) for entry in sequences):
        wrong = "sequences.json is no list of objects"
    elif len(sequences) != len(starts):
        wrong = f"sequences.json does not describe the {len(starts)} sequences of the .npz"
    if wrong is not None:
        raise TraceError(f"{folder} is damaged or of another form: {wrong}. Copy it again.")
    return sequences, arrays


def _convert_lines(file: Path, out: Path, fingerprint: str, num_experts: int | None) -> int:
    """Lines count their tokens in "tok"; where the count does not rise, a sequence begins. Token ids are not known."""
    tokens = list(_read_lines(file))
    if not tokens:
        raise TraceError(f"{file} is empty. Give one JSON object a line.")
    largest = max(expert for _, layers in tokens for experts in layers for expert in experts)
    if num_experts is None:
        num_experts = largest + 1
    elif largest >= num_experts:
        raise TraceError(f"{file} has the expert {largest}, and only 0 to {num_experts - 1} were said to exist.")
    top_k = max(len(experts) for _, layers in tokens for experts in layers)
    format = TraceFormat(
        (num_experts,) * len(tokens[0][1]),
        top_k,
        fingerprint,
        has_weights=False,
        ranked=False,
        source=f"converted from {file.name}: decode steps, token ids are not known",
    )
    with TraceWriter(out, format) as writer:
        rows = writer.new_rows(len(tokens))
        sequence, last = 0, tokens[0][0] - 1
        for row, (count, layers) in zip(rows, tokens, strict=True):
            sequence, last = sequence + (count <= last), count
            row["sequence"] = sequence
            for layer, experts in enumerate(layers):
                row["experts"][layer, : len(experts)] = experts
        rows["phase"] = DECODE
        writer.write(rows)
    return len(tokens)


def _read_lines(file: Path) -> Iterator[tuple[int, list[list[int]]]]:
    num_layers = None
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                count, layers = _parse_line(file, number, line)
                if num_layers not in (None, len(layers)):
                    raise _bad_line(file, number, f"it has {len(layers)} layers, the lines before have {num_layers}")
                num_layers = len(layers)
                yield count, layers
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{file} cannot be read as text ({error}). Give JSON lines.") from error


def _parse_line(file: Path, number: int, line: str) -> tuple[int, list[list[int]]]:
    try:
        entry = json.loads(line)
        count, layers = entry["tok"], entry["layers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _bad_line(file, number, 'it is not an object with "tok" and "layers"') from None
    if type(count) is not int or not isinstance(layers, list) or not layers:
        raise _bad_line(file, number, '"tok" must be a number and "layers" a list of lists')
    for layer, experts in enumerate(layers):
        if not isinstance(experts, list) or not experts or any(type(expert) is not int for expert in experts):
            raise _bad_line(file, number, f"layer {layer} is not a list of expert numbers")
        if min(experts) < 0 or max(experts) >= 65535 or len(set(experts)) != len(experts):
            raise _bad_line(file, number, f"layer {layer} has a negative, too large or repeated expert number")
    return count, layers


def _bad_line(file: Path, number: int, what: str) -> TraceError:
    return TraceError(
        f'{file}, line {number}: {what}. A line reads {{"tok": 1, "layers": [[6, 8], [7, 16]]}}, '
        "with the expert numbers of each layer."
    )
