"""The options that several commands share, of loading and of sampling, and the loading itself."""

import argparse
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

from moeflow.engine.sampling_params import SamplingParams
from moeflow.errors import MoeflowError

_SAMPLING_HELP = {  # field: (metavar, help)
    "max_new_tokens": ("N", "most tokens of an answer"),
    "temperature": ("T", "0 is greedy"),
    "top_k": ("K", "sample from the K likeliest tokens; 0 for all"),
    "top_p": ("P", "sample from this share of the probability"),
    "min_p": ("P", "leave out tokens below this share of the likeliest one's probability"),
    "repetition_penalty": ("R", "divides the logits of tokens in prompt and answer"),
    "presence_penalty": ("A", "taken off the logits of tokens in the answer"),
    "frequency_penalty": ("A", "the same, times how often they are in it"),
    "seed": ("S", "seed of the sampling"),
    "stop": ("TEXT", "end an answer before TEXT; may be repeated"),
    "logprobs": ("N", "report each token's log-probability and those of the N likeliest"),
    "ignore_eos": ("", "go on behind the end of sequence"),
}
_TYPES = {"int": int, "float": float, "int | None": int}
_MEMORY_HELP = 'bytes, "6GiB", "600MB", "25%%" of all experts, or "auto"'


def add_loading_options(parser, *, compiles: bool = True) -> None:
    """Add the options of load_moe, and --json, to a command.

    Args:
        compiles: whether --compile has an effect on what the command does.
    """
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    parser.add_argument("--dtype", default="auto", help='"auto", "float32", "bfloat16" or "float16"')
    parser.add_argument("--expert-memory", default="auto", metavar="SIZE", help=_MEMORY_HELP)
    parser.add_argument("--host-memory", default="auto", metavar="SIZE", help=f"pinned, CUDA only: {_MEMORY_HELP}")
    parser.add_argument("--policy", default="auto", help="eviction: lru, lfu, lfru, static, forecast or auto")
    parser.add_argument(
        "--predictor", default="auto", metavar="P", help='who says what to prefetch: "auto", a name, a file, or "none"'
    )
    parser.add_argument(
        "--miss",
        default="copy",
        help='"copy", or "cheapest": on a GPU, the CPU may compute experts in host memory; lossy',
    )
    parser.add_argument("--quantization", metavar="F", help="round experts as they are read: int8, int4 ...; lossy")
    parser.add_argument(
        "--prune",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out this share of experts behind the first; lossy",
    )
    if compiles:
        parser.add_argument("--compile", action="store_true", help="torch.compile: a slow start, then faster decoding")
    else:
        parser.set_defaults(compile=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object with answer and figures")


def load_model(source, arguments, **options):
    """Load model and tokenizer, with the loader's progress only where somebody looks at it.

    Args:
        arguments: what `add_loading_options` parsed.
        **options: passed to load_moe as well.
    """
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    with Status(f"loading {source}", console=console) if console.is_terminal else nullcontext():
        from transformers import AutoTokenizer
        from transformers.utils import logging

        from moeflow.loading.load_moe import load_moe

        logging.disable_progress_bar()
        names = (
            "device",
            "dtype",
            "expert_memory",
            "host_memory",
            "policy",
            "miss",
            "quantization",
            "prune",
            "compile",
        )
        options["predictor"] = None if arguments.predictor == "none" else arguments.predictor
        model = load_moe(source, **{name: getattr(arguments, name) for name in names}, **options)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise MoeflowError(f"{source} has no tokenizer that transformers can load: {error}") from error
    return model, tokenizer


def add_sampling_options(
    parser: argparse.ArgumentParser, *, leave_out: Collection[str] = (), defaults: dict[str, str] | None = None
) -> None:
    """Add a flag for each field of SamplingParams; one that is not given stays None.

    Args:
        parser: the command's.
        leave_out: fields without a flag.
        defaults: what holds where a flag is not given, for the help; by default the field's default.
    """
    for field in fields(SamplingParams):
        if field.name in leave_out:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        metavar, text = _SAMPLING_HELP[field.name]
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", default=None, help=text)
        elif field.name == "stop":
            parser.add_argument(flag, action="append", metavar=metavar, help=text)
        else:
            default = (defaults or {}).get(field.name, field.default)
            if default is not None:
                text += f" ({default:g})" if isinstance(default, (int, float)) else f" ({default})"
            parser.add_argument(flag, type=_TYPES[str(field.type)], metavar=metavar, help=text)


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of SamplingParams whose flags were given.

    Raises:
        ConfigError: one of them is out of its range.
    """
    found = {field.name: getattr(arguments, field.name, None) for field in fields(SamplingParams)}
    given = {name: value for name, value in found.items() if value is not None}
    SamplingParams(**given)  # checks
    return given
