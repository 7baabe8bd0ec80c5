"""`moeflow quantize`: experts in few bits, the same for all or chosen for each."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from moeflow.errors import ConfigError

if TYPE_CHECKING:
    from moeflow.calibration.expert_inputs import ExpertInputs
    from moeflow.convert.mixed_precision import MixedPrecision
    from moeflow.convert.quantize import Written

WIDTHS = (1, 2, 3, 4, 8)
GROUPS = (32, 64, 128)


def add_quantize_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's commands."""
    quantize = commands.add_parser("quantize", help="write a folder whose experts are quantised; lossy")
    quantize.add_argument("model", help="hub id, folder or GGUF file, experts in float32, bfloat16 or float16")
    quantize.add_argument("out", help="folder to write; a killed run is continued by the next")
    width = quantize.add_mutually_exclusive_group(required=True)
    width.add_argument("--bits", type=int, choices=WIDTHS, help="of every expert's weights")
    width.add_argument(
        "--average-bits",
        type=float,
        metavar="B",
        help="choose 2, 3, 4 or 8 for each expert (1 too, below 2), as many bytes in all",
    )
    quantize.add_argument(
        "--group-size", type=int, default=64, choices=GROUPS, help="weights that share a scale (64); with 8 bits too"
    )
    quantize.add_argument("--method", default="hqq", choices=("hqq", "rtn", "gptq"), help="how codes are chosen (hqq)")
    quantize.add_argument(
        "--calibration",
        metavar="FILE",
        help="text that --average-bits and gptq learn from; without it, texts that every machine has",
    )
    quantize.add_argument(
        "--requantize", action="store_true", help="round experts that a GGUF file has in few bits already a second time"
    )
    quantize.add_argument("--json", action="store_true", help="print one JSON object")
    quantize.set_defaults(run=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
    from moeflow.cli.progress import bytes_progress
    from moeflow.convert.quantize import quantize_model

    text = _calibration_text(arguments)
    about: dict[str, Any] = {}
    formats: str | list[list[str]]
    if arguments.average_bits is None:
        formats = f"int{arguments.bits}-g{arguments.group_size}"
    else:
        chosen = _choose(arguments, text)
        formats = chosen.formats
        about = {"cost": chosen.allocation.cost, "bound": chosen.allocation.bound, "gap": chosen.allocation.gap}
    inputs = _record(arguments, text) if arguments.method == "gptq" else None
    with bytes_progress(f"quantising {arguments.model}") as progress:
        written = quantize_model(
            arguments.model,
            arguments.out,
            formats,
            method=arguments.method,
            calibration=inputs,
            requantize=arguments.requantize,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(about | figures_of(written)))
    else:
        print(line_of(written))
        if "gap" in about:
            print(f"no other choice is better by more than {about['gap']:.2%} of the estimated loss (LP bound)")
    return 0


def figures_of(written: "Written") -> dict[str, Any]:
    """Return what --json tells of a quantised folder."""
    return {
        "folder": str(written.folder),
        "bytes": sum(file.stat().st_size for file in written.folder.iterdir()),
        "expert_bytes": written.expert_bytes,
        "bits_per_weight": round(written.bits_per_weight, 3),
        "formats": written.formats,
    }


def line_of(written: "Written") -> str:
    """Return what is told of a quantised folder."""
    kinds = ", ".join(f"{count} experts in {name}" for name, count in sorted(written.formats.items()))
    num_bytes = figures_of(written)["bytes"]
    return (
        f"wrote {written.folder}, {num_bytes:,} bytes: {kinds}, {written.bits_per_weight:.2f} bits a weight with "
        f"scales. load_moe({str(written.folder)!r})"
    )


def _calibration_text(arguments: argparse.Namespace) -> str | None:
    """Read the calibration text; return None where none is given."""
    from pathlib import Path

    if arguments.calibration is None:
        return None
    if arguments.average_bits is None and arguments.method != "gptq":
        raise ConfigError(
            "--calibration is what --average-bits and --method gptq learn from: give one of them, or leave it out."
        )
    try:
        return Path(arguments.calibration).read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {arguments.calibration} cannot be read as text: {error}") from error


def _choose(arguments: argparse.Namespace, text: str | None) -> "MixedPrecision":
    """Measure the experts on text and choose a format for each."""
    from moeflow.cli.progress import share_progress
    from moeflow.convert.mixed_precision import choose_formats

    with share_progress(f"measuring the experts of {arguments.model}") as progress:
        return choose_formats(
            arguments.model,
            text,
            arguments.average_bits,
            group_size=arguments.group_size,
            method=arguments.method,
            progress=progress,
        )


def _record(arguments: argparse.Namespace, text: str | None) -> "ExpertInputs":
    """Run the model on text and keep what its experts see."""
    from moeflow.cli.progress import count_progress
    from moeflow.convert.calibrate import record_text

    with count_progress(f"reading the calibration text with {arguments.model}") as progress:
        return record_text(arguments.model, text, progress=progress)
