"""`moeflow batch`: a file of prompts, answered together."""

import json
import sys
from pathlib import Path

from moeflow.errors import ConfigError
from moeflow.loading_cli import add_loading_options, load_model

_SAMPLING = (
    ("max-new-tokens", int, "N", "most tokens of an answer (256)"),
    ("temperature", float, "T", "0 is greedy (0)"),
    ("top-k", int, "K", "sample from the K likeliest tokens; 0 for all (0)"),
    ("top-p", float, "P", "sample from this share of the probability (1)"),
    ("min-p", float, "P", "leave out tokens below this share of the likeliest one's probability (0)"),
    ("repetition-penalty", float, "R", "divides the logits of tokens in prompt and answer (1)"),
    ("presence-penalty", float, "A", "taken off the logits of tokens in the answer (0)"),
    ("frequency-penalty", float, "A", "the same, times how often they are in it (0)"),
    ("seed", int, "S", "seed of the sampling; each line's number is added to it"),
    ("logprobs", int, "N", "report each token's log-probability and those of the N likeliest"),
)
_MOST_SHOWN = 5
_GROUPS_AHEAD = 4  # batches that the engine holds, so that it can choose what to compute together


def add_batch_command(commands) -> None:
    """Add the command to the parser's commands."""
    batch = commands.add_parser("batch", help="answer a file of prompts together; a killed run is continued")
    batch.add_argument("model", help="hub id or folder")
    batch.add_argument("--input", required=True, metavar="FILE", help="requests, one JSON object a line")
    batch.add_argument("--output", required=True, metavar="FILE", help="answers, appended; what is there is not redone")
    batch.add_argument("--retry-failed", action="store_true", help="try again what failed in an earlier run")
    batch.add_argument("--batch-size", type=int, default=32, metavar="N", help="most sequences computed at once (32)")
    batch.add_argument("--max-step-tokens", type=int, default=512, metavar="N", help="most tokens of a step (512)")
    batch.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="most sequences in one pass, grouped so that they need few experts; without it all are in one pass",
    )
    batch.add_argument("--kv-memory", default="auto", metavar="SIZE", help='keys and values: bytes, "2GiB" or "auto"')
    for name, kind, metavar, text in _SAMPLING:
        batch.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    batch.add_argument("--stop", action="append", metavar="TEXT", help="end an answer before TEXT; may be repeated")
    batch.add_argument("--ignore-eos", action="store_true", help="go on behind the end of sequence")
    add_loading_options(batch)
    batch.set_defaults(run=_batch)


def _batch(arguments) -> int:
    from moeflow.batch_file import BatchFile, failure_record
    from moeflow.batch_request import read_batch

    _check_paths(arguments)
    requests, refused = read_batch(arguments.input, _defaults(arguments))
    line_of = {entry.id: entry.number for entry in [*requests, *refused]}
    with BatchFile(arguments.output, retry_failed=arguments.retry_failed) as file:
        num_before = sum(name in file.finished for name in line_of)
        for line in refused:
            if line.id not in file.finished:
                file.append(failure_record(line, line.error))
        requests = [request for request in requests if request.id not in file.finished]
        about = _answer(arguments, requests, file) if requests else {}
        failed = {line_of[name]: error for name, error in file.finished.items() if error and name in line_of}
    about = {
        "output": arguments.output,
        "requests": len(line_of),
        "finished_before": num_before,
        "failed": [{"line": number, "error": failed[number]} for number in sorted(failed)],
        **about,
    }
    print(json.dumps(about) if arguments.json else _summary(about))
    return _report_failures(arguments, about)


def _check_paths(arguments) -> None:
    source, out = Path(arguments.input), Path(arguments.output)
    if source.exists() and out.exists() and source.samefile(out):
        raise ConfigError(f"--output {out} is the input too. Give another output.")
    for name in ("batch_size", "max_step_tokens"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be 1 or more.")


def _defaults(arguments):
    """Return the sampling of lines that leave it open."""
    from moeflow.sampling import SamplingParams

    names = [name.replace("-", "_") for name, *_ in _SAMPLING]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return SamplingParams(**given, stop=tuple(arguments.stop or ()), ignore_eos=arguments.ignore_eos)


def _answer(arguments, requests, file) -> dict:
    """Answer the requests; returns the figures of doing so."""
    from moeflow.batch import answer_batch
    from moeflow.batch_figures import BatchFigures
    from moeflow.engine import Engine
    from moeflow.progress import share_progress

    model, tokenizer = load_model(arguments.model, arguments)
    options = {name: getattr(arguments, name) for name in ("max_step_tokens", "kv_memory", "group_size")}
    with model.moeflow, Engine(model, tokenizer, max_batch_size=arguments.batch_size, **options) as engine:
        figures = BatchFigures(model, len(requests))
        with share_progress(f"answering {arguments.input}") as progress:

            def on_step(num_tokens, num_ended):
                figures.add(num_tokens, num_ended)
                if figures.due:
                    progress(figures.share, figures.line())

            num_ahead = _GROUPS_AHEAD * arguments.batch_size
            answer_batch(engine, tokenizer, requests, file, num_ahead=num_ahead, on_step=on_step)
        return {**figures.as_dict(), "engine": engine.stats()}


def _summary(about) -> str:
    num_done = about["requests"] - len(about["failed"])
    text = f"{num_done} of {about['requests']} requests answered in {about['output']}"
    if about["finished_before"]:
        text += f", {about['finished_before']} of them finished before"
    return f"{text} · {about['line']}" if "line" in about else text


def _report_failures(arguments, about) -> int:
    failed = about["failed"]
    if not failed:
        return 0
    shown = "; ".join(f"line {entry['line']}: {entry['error']}" for entry in failed[:_MOST_SHOWN])
    more = f"; and {len(failed) - _MOST_SHOWN} more" if len(failed) > _MOST_SHOWN else ""
    print(
        f"moeflow: {len(failed)} of {about['requests']} requests of {arguments.input} failed: {shown}{more}. "
        "--retry-failed tries them again.",
        file=sys.stderr,
    )
    return 1
