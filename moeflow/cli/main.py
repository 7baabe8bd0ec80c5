"""The command line: parses, calls the library, and turns its errors into one line.

torch and transformers are imported by the commands that need them, so that --help answers at once.
"""

import argparse
import io
import sys

from moeflow import __version__
from moeflow.cli.batch import add_batch_command
from moeflow.cli.chat import add_chat_commands
from moeflow.cli.doctor import add_doctor_command
from moeflow.cli.download import add_download_command, resolve_model
from moeflow.cli.fit import add_fit_command
from moeflow.cli.gguf import add_gguf_command
from moeflow.cli.info import add_info_command
from moeflow.cli.models import add_demo_model_command, add_pack_command
from moeflow.cli.parallel import add_parallel_command
from moeflow.cli.place import add_place_command
from moeflow.cli.predictor import add_predictor_commands
from moeflow.cli.quantize import add_quantize_command
from moeflow.cli.serve import add_serve_command
from moeflow.cli.tiers import add_tiers_command
from moeflow.cli.trace import add_trace_commands
from moeflow.cli.verify import add_verify_command
from moeflow.errors import MoeflowError


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; sys.argv's when None.

    Returns:
        The exit code: 0, 1 for an error that was told in one line, 130 for Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer or a name that this terminal has no letters for
    try:
        resolve_model(arguments)
        return arguments.run(arguments)
    except MoeflowError as error:
        print(f"moeflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moeflow: interrupted", file=sys.stderr)
        exec("")  # an interrupt inside an exec() of text, as of a dataclass, would end CPython with the signal itself
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; the interpreter would complain once more
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeflow", description="Run any transformers mixture-of-experts model inside the memory you name."
    )
    parser.add_argument("--version", action="version", version=f"moeflow {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_chat_commands(commands)
    add_info_command(commands)
    add_doctor_command(commands)
    add_download_command(commands)
    add_fit_command(commands)
    add_pack_command(commands)
    add_gguf_command(commands)
    add_batch_command(commands)
    add_serve_command(commands)
    add_quantize_command(commands)
    add_trace_commands(commands)
    add_predictor_commands(commands)
    add_parallel_command(commands)
    add_place_command(commands)
    add_tiers_command(commands)
    add_verify_command(commands)
    add_demo_model_command(commands)
    return parser
