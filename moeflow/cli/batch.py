"""`moeflow batch`: a file of prompts, answered together."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.cli.model_argument import add_model_argument
from moeflow.cli.options import (
    add_kept_options,
    add_loading_options,
    add_sampling_options,
    given_sampling,
    kept_options,
    load_model,
)
from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from moeflow.batch.requests import BatchRequest
    from moeflow.batch.results import BatchFile

_MAX_SHOWN_FAILURES = 5
_BATCHES_AHEAD = 4  # that the engine holds, so that it can choose what to compute together


EXAMPLES = """\
a line of the input, in either form:
  {"prompt": "The capital of France is", "max_new_tokens": 20}
  {"id": "a", "messages": [{"role": "user", "content": "Name three rivers."}], "temperature": 0.7}
  {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 20}}
docs/batch.md tells the rest."""


def add_batch_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's commands."""
    batch = commands.add_parser(
        "batch",
        help="answer a file of prompts together; a killed run is continued",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(batch)
    batch.add_argument("--input", required=True, metavar="FILE", help="requests, one JSON object a line")
    batch.add_argument("--output", required=True, metavar="FILE", help="answers, appended; what is there is not redone")
    batch.add_argument("--retry-failed", action="store_true", help="try again what failed in an earlier run")
    batch.add_argument(
        "--changed",
        choices=("stop", "keep", "redo"),
        default="stop",
        help="where the output answers a request that had another prompt, sampling or model then: stop before anything "
        "is done, keep the answer, or redo it (stop)",
    )
    batch.add_argument("--batch-size", type=int, default=32, metavar="N", help="most sequences computed at once (32)")
    batch.add_argument(
        "--max-step-tokens",
        type=int,
        metavar="N",
        help="most tokens of a step (512, or the batch size if more)",
    )
    batch.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="most sequences in one pass, grouped so that they need few experts; without it all are in one pass",
    )
    batch.add_argument("--kv-memory", default="auto", metavar="SIZE", help='keys and values: bytes, "2GiB" or "auto"')
    add_kept_options(batch)
    add_sampling_options(batch, defaults={"seed": "each line's number is added to it"})
    add_loading_options(batch)
    batch.set_defaults(run=_batch)


def _batch(arguments: argparse.Namespace) -> int:
    from moeflow.batch.requests import read_batch
    from moeflow.batch.results import BatchFile, failure_record

    _check_options(arguments)
    requests, refused = read_batch(
        arguments.input, SamplingParams(**given_sampling(arguments)), _answered_by(arguments)
    )
    line_of = {request.id: request.number for request in requests} | {line.id: line.number for line in refused}
    with BatchFile(arguments.output) as file:
        _forget(arguments, requests, file)
        num_before = sum(name in file.finished for name in line_of)
        for line in refused:
            if line.id not in file.finished:
                file.append(failure_record(line, line.error))
        requests = [request for request in requests if request.id not in file.finished]
        if num_before and requests:
            print(
                f"{arguments.output} has {num_before:,} of {len(line_of):,} requests already; {len(requests):,} are "
                "left.",
                file=sys.stderr,
            )
        try:
            figures, interrupted = _answer(arguments, requests, file) if requests else (None, False)
        except KeyboardInterrupt:  # before the first step
            figures, interrupted = None, True
        if interrupted:
            file.read()
        failed = {line_of[name]: error for name, error in file.finished.items() if error and name in line_of}
        num_finished = sum(name in file.finished for name in line_of)
    about = {
        "output": arguments.output,
        "requests": len(line_of),
        "finished_before": num_before,
        "finished": num_finished,
        "interrupted": interrupted,
        "failed": [{"line": number, "error": failed[number]} for number in sorted(failed)],
        **(figures or {}),
    }
    print(json.dumps(about) if arguments.json else _summary(about, figures))
    _tell_failures(arguments, about)
    if interrupted:
        print(
            f"moeflow: interrupted. What is in {arguments.output} is kept; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    return 1 if failed else 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be before a model is loaded."""
    from moeflow.memory_size import parse_memory

    source, out = Path(arguments.input), Path(arguments.output)
    if source.exists() and out.exists() and source.samefile(out):
        raise ConfigError(f"--output {out} is the input too. Give another output.")
    if arguments.max_step_tokens is None:
        arguments.max_step_tokens = max(512, arguments.batch_size)
    for name in ("batch_size", "max_step_tokens", "group_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more.")
    if arguments.max_step_tokens < arguments.batch_size:
        raise ConfigError(
            f"--max-step-tokens is {arguments.max_step_tokens}; it must be at least --batch-size, "
            f"{arguments.batch_size}, since each sequence takes a token of every step."
        )
    if arguments.kv_memory != "auto" and not arguments.kv_memory.endswith("%"):
        parse_memory(arguments.kv_memory, name="--kv-memory", whole_bytes=0)
    kept_options(arguments)


def _answered_by(arguments: argparse.Namespace) -> str:
    """Return what an answer depends on beside its request: the model, by name wherever it lies, and its rounding."""
    name = Path(arguments.model).resolve().name
    return f"{name} dtype={arguments.dtype} quantization={arguments.quantization} prune={arguments.prune:g}"


def _forget(arguments: argparse.Namespace, requests: "list[BatchRequest]", file: "BatchFile") -> None:
    """Remove the lines that are to be written anew; refuse a file that answers other requests."""
    changed = [request for request in requests if file.digests.get(request.id, request.digest) != request.digest]
    if changed and arguments.changed == "stop":
        first = changed[0]
        raise ConfigError(
            f"{arguments.output} was written with another prompt, sampling or model for {len(changed):,} of "
            f"{len(requests):,} requests; the first is line {first.number}, id {first.id!r}. Give another output, or "
            "--changed keep to leave these answers as they are, or --changed redo to replace them."
        )
    names = {request.id for request in changed} if arguments.changed == "redo" else set()
    if arguments.retry_failed:
        names |= {name for name, error in file.finished.items() if error}
    file.forget(names)


def _answer(
    arguments: argparse.Namespace, requests: "list[BatchRequest]", file: "BatchFile"
) -> tuple[dict[str, Any], bool]:
    """Answer the requests; returns the figures of doing so, and whether Ctrl-C ended it."""
    from moeflow.batch.figures import BatchFigures
    from moeflow.batch.run import answer_batch
    from moeflow.cli.progress import share_progress
    from moeflow.engine.serial.choose_engine import engine_for

    model, tokenizer = load_model(arguments.model, arguments, kv_memory=arguments.kv_memory)
    options = {name: getattr(arguments, name) for name in ("max_step_tokens", "kv_memory", "group_size")}
    options |= kept_options(arguments)
    with model.moeflow, engine_for(model, tokenizer, max_batch_size=arguments.batch_size, **options) as engine:
        figures = BatchFigures(engine, requests)
        try:
            with share_progress(Path(arguments.input).name) as progress:

                def on_step(num_new: dict[str, int], ended: list[str]) -> None:
                    figures.add(num_new, ended)
                    if figures.due:
                        progress(figures.share, figures.line())

                num_ahead = _BATCHES_AHEAD * arguments.batch_size
                answer_batch(engine, tokenizer, requests, file, num_ahead=num_ahead, on_step=on_step)
        except KeyboardInterrupt:
            return figures.as_dict(), True
        return figures.as_dict(), False


def _summary(about: dict[str, Any], figures: dict[str, Any] | None) -> str:
    from moeflow.batch.figures import summary_line

    num_answered = about["finished"] - len(about["failed"])
    text = f"{num_answered:,} of {about['requests']:,} requests answered in {about['output']}"
    if about["finished_before"]:
        text += f", {about['finished_before']:,} finished before"
    return f"{text}\n{summary_line(figures)}" if figures else text


def _tell_failures(arguments: argparse.Namespace, about: dict[str, Any]) -> None:
    failed = about["failed"]
    if not failed:
        return
    shown = "; ".join(f"line {entry['line']}: {entry['error'].rstrip('.')}" for entry in failed[:_MAX_SHOWN_FAILURES])
    more = f"; and {len(failed) - _MAX_SHOWN_FAILURES:,} more" if len(failed) > _MAX_SHOWN_FAILURES else ""
    print(
        f"moeflow: {len(failed):,} of {about['requests']:,} requests of {arguments.input} failed: {shown}{more}. "
        "--retry-failed tries them again, once the cause is gone.",
        file=sys.stderr,
    )
