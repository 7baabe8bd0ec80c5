"""Flags of loading and of sampling that several commands share, and the loading itself.

The flags are the fields of `LoadOptions` and `SamplingParams`. Knows argparse and load_moe. Knows nothing of answers.
"""

import argparse
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.cli.download import fetched
from moeflow.engine.sampling_params import SamplingParams
from moeflow.engine.structure.schema import MOST_LETTERS
from moeflow.errors import ConfigError
from moeflow.loading.options import flag_options
from moeflow.memory_size import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    "prompt_logprobs": ("N", "the same of each token of the prompt but the first"),
    "ignore_eos": ("", "go on behind the end of sequence"),
    "skip_special_tokens": ("", "write special tokens in the answer"),
    "json_schema": ("FILE", "the answer is JSON that the schema in FILE allows"),
    "regex": ("TEXT", "the answer matches this regular expression"),
    "grammar": ("FILE", "the answer is of the grammar in FILE, in llguidance's form of Lark"),
}
_IN_FILES = ("json_schema", "grammar")
_TYPES = {"int": int, "float": float, "int | None": int}


def add_loading_options(
    parser: argparse.ArgumentParser, *, as_json: bool = True, leave_out: Collection[str] = ()
) -> None:
    """Add the flags of load_moe to a command.

    Args:
        parser: of the command.
        as_json: whether it has --json as well.
        leave_out: options without a flag.
    """
    parser.set_defaults(loading_flags=[option.name for option in flag_options() if option.name not in leave_out])
    for option in flag_options():
        if option.name in leave_out:
            continue
        flag, text = f"--{option.name.replace('_', '-')}", option.metadata["flag"].replace("%", "%%")
        if isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = float if isinstance(option.default, float) else str
            parser.add_argument(flag, type=kind, default=option.default, metavar=option.metadata["metavar"], help=text)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print one JSON object with answer and figures")


def _tell_nothing(text: str) -> None:
    """Tell nobody what comes next."""


def load_model(
    source: str | Path, arguments: argparse.Namespace, *, tell: Callable[[str], None] = _tell_nothing, **options: Any
) -> "tuple[Any, PreTrainedTokenizerBase]":
    """Load model and tokenizer, with the loader's progress only on a terminal.

    Args:
        source: a hub id or a folder.
        arguments: what `add_loading_options` parsed.
        tell: called with what comes next, as it comes.
        **options: passed to load_moe as well.

    Returns:
        As load_moe does, the model with its runtime as `model.moeflow`; and its tokenizer.
    """
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    if not os.path.isdir(source):
        tell("fetching what is missing of the model")
        source = fetched(source)
    with Status(f"loading {source}", console=console) if console.is_terminal else nullcontext():
        tell("importing torch and transformers")
        from transformers.utils import logging

        from moeflow.hf.pretrained import load_tokenizer, resolve_folder
        from moeflow.loading.load_moe import load_moe

        logging.disable_progress_bar()
        source = resolve_folder(source)  # of a folder with a GGUF file, too
        flags = {name: getattr(arguments, name) for name in arguments.loading_flags}
        if flags["predictor"] == "none":
            flags["predictor"] = None
        tell("loading the weights that stay in memory")
        model = load_moe(source, **flags, **options)
        tell("loading the tokenizer")
        tokenizer = load_tokenizer(source)
    return model, tokenizer


def prepare_step(model: Any) -> None:
    """Capture the program of a model's decode steps before its first answer, or take it from the disk."""
    step = model.moeflow.step
    if step is not None:
        with preparing_step():
            step.prepare()


def preparing_step() -> AbstractContextManager[Any]:
    """Tell on a terminal what goes on, the first time that a model is run."""
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    text = "writing the decode step as a program, once a model"
    return Status(text, console=console) if console.is_terminal else nullcontext()


def add_kept_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an engine's disk to a command."""
    parser.add_argument(
        "--kept-folder",
        metavar="FOLDER",
        help="folder to which beginnings of prompts go that leave --kv-memory; they come back where that saves time",
    )
    parser.add_argument("--kept-disk", default="4GiB", metavar="SIZE", help="most bytes there of a model (4GiB)")


def kept_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of an engine that `add_kept_options` parsed.

    Raises:
        ConfigError: --kept-disk is no size.
    """
    parse_bytes(arguments.kept_disk, name="--kept-disk")
    return {"kept_folder": arguments.kept_folder, "kept_disk": arguments.kept_disk}


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
        if field.name in leave_out or field.name not in _SAMPLING_HELP:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        metavar, text = _SAMPLING_HELP[field.name]
        if field.type == "bool":
            turned = ("store_false", f"--no-{flag.removeprefix('--')}") if field.default else ("store_true", flag)
            parser.add_argument(turned[1], dest=field.name, action=turned[0], default=None, help=text)
        elif field.name == "stop":
            parser.add_argument(flag, action="append", metavar=metavar, help=text)
        else:
            default = (defaults or {}).get(field.name, field.default)
            if default is not None:
                text += f" ({default:g})" if isinstance(default, (int, float)) else f" ({default})"
            parser.add_argument(flag, type=_TYPES.get(str(field.type), str), metavar=metavar, help=text)


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of SamplingParams whose flags were given.

    Raises:
        ConfigError: one of them is out of its range, or its file cannot be read.
    """
    found = {field.name: getattr(arguments, field.name, None) for field in fields(SamplingParams)}
    given = {name: value for name, value in found.items() if value is not None}
    for name in given.keys() & _IN_FILES:
        given[name] = _read_text(Path(given[name]), f"--{name.replace('_', '-')}")
    SamplingParams(**given)  # checks
    return given


def _read_text(path: Path, flag: str) -> str:
    """Return the text of a file; one that is far too long is read in part, and refused by its length."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MOST_LETTERS + 1)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path} is not UTF-8 text.") from None
