"""Loading flags that several commands share, and the loading itself.

The flags are the fields of `LoadOptions`. Knows argparse and load_moe. Knows nothing of answers.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.loading.options import flag_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_loading_options(parser: argparse.ArgumentParser, *, compiles: bool = True) -> None:
    """Add the flags of load_moe, and --json, to a command.

    Args:
        parser: of the command.
        compiles: whether --compile has an effect on what the command does.
    """
    for option in flag_options():
        flag, text = f"--{option.name.replace('_', '-')}", option.metadata["flag"].replace("%", "%%")
        if option.name == "compile" and not compiles:
            parser.set_defaults(compile=False)
        elif isinstance(option.default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = float if isinstance(option.default, float) else str
            parser.add_argument(flag, type=kind, default=option.default, metavar=option.metadata["metavar"], help=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object with answer and figures")


def load_model(
    source: str | Path, arguments: argparse.Namespace, **options: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load model and tokenizer, with the loader's progress only on a terminal.

    Args:
        source: a hub id or a folder.
        arguments: what `add_loading_options` parsed.
        **options: passed to load_moe as well.
    """
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    with Status(f"loading {source}", console=console) if console.is_terminal else nullcontext():
        from transformers.utils import logging

        from moeflow.hf.pretrained import load_tokenizer
        from moeflow.loading.load_moe import load_moe

        logging.disable_progress_bar()
        flags = {option.name: getattr(arguments, option.name) for option in flag_options()}
        if flags["predictor"] == "none":
            flags["predictor"] = None
        model = load_moe(source, **flags, **options)
        tokenizer = load_tokenizer(source)
    return model, tokenizer
