"""`moeflow verify`: a model's experts against transformers' own, or what another folder's experts cost."""

import argparse
import json
from pathlib import Path

from moeflow.cli.model_argument import add_model_argument
from moeflow.errors import ConfigError


def add_verify_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's commands."""
    verify = commands.add_parser(
        "verify", help="compare experts with transformers' own, layer by layer; exit 1 where one differs"
    )
    add_model_argument(verify, ", packed and quantised ones too")
    other = verify.add_mutually_exclusive_group()
    other.add_argument(
        "--reference", metavar="FOLDER", help="the folder that the experts should be those of; without it the model's"
    )
    other.add_argument(
        "--against", metavar="FOLDER", help="a folder of the same model: measure what its experts cost, by layer"
    )
    verify.add_argument("--text", metavar="FILE", help="to run; without it, the Python standard library's")
    verify.add_argument("--tokens", type=int, default=256, metavar="N", help="of the text (256)")
    verify.add_argument("--dtype", default="auto", help="to compute in; without it the checkpoint's")
    verify.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    verify.add_argument(
        "--expert-memory", metavar="SIZE", help="as of the other commands; without it, one layer's experts"
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from moeflow.cli.progress import count_progress

    logging.disable_progress_bar()
    text = None if arguments.text is None else _read(arguments.text)
    options = {
        "text": text,
        "num_tokens": arguments.tokens,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "expert_memory": arguments.expert_memory,
    }
    with count_progress(f"comparing the layers of {arguments.model}") as progress:
        if arguments.against is not None:
            from moeflow.verify.cost import measure_cost

            cost = measure_cost(arguments.model, arguments.against, progress=progress, **options)
            print(json.dumps(cost.as_dict()) if arguments.json else cost)
            return 0
        from moeflow.verify.verify import verify

        found = verify(arguments.model, reference=arguments.reference, progress=progress, **options)
    print(json.dumps(found.as_dict()) if arguments.json else found)
    return 0 if found.equal else 1


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {file} cannot be read as text: {error}") from error
