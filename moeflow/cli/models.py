"""`moeflow pack` and `moeflow demo-model`: commands that write a model's folder."""

import argparse
import json
from typing import TYPE_CHECKING

from moeflow.cli.model_argument import add_model_argument

if TYPE_CHECKING:
    from moeflow.convert.pack import Packed


def add_pack_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `pack` to the parser's commands."""
    pack = commands.add_parser("pack", help="write a folder whose experts are one aligned, checksummed read each")
    add_model_argument(pack)
    pack.add_argument("out", help="folder to write; a killed run is continued by the next")
    pack.add_argument(
        "--lossless",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 experts in three quarters of their bytes, every bit kept: an error where that saves nothing, or "
        "never; without either, where it saves a tenth",
    )
    pack.add_argument("--json", action="store_true", help="print one JSON object")
    pack.set_defaults(run=_pack)


def add_demo_model_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo-model` to the parser's commands."""
    demo = commands.add_parser("demo-model", help="build the demo model: 480 experts, 1.4 GB, no hub needed")
    demo.add_argument("out", nargs="?", help="folder to write; without it the user's cache directory")
    demo.add_argument("--json", action="store_true", help="print one JSON object")
    demo.set_defaults(run=_demo_model)


def _pack(arguments: argparse.Namespace) -> int:
    from moeflow.cli.progress import bytes_progress
    from moeflow.convert.pack import pack_model

    with bytes_progress(f"packing {arguments.model}") as progress:
        packed = pack_model(arguments.model, arguments.out, lossless=arguments.lossless, progress=progress)
    num_bytes = sum(file.stat().st_size for file in packed.folder.iterdir())
    if arguments.json:
        print(json.dumps({**packed._asdict(), "folder": str(packed.folder), "bytes": num_bytes}))
    else:
        print(
            f"wrote {packed.folder}, {num_bytes:,} bytes: {_stored(packed)} The weights take "
            f"{packed.weight_bytes / packed.source_bytes:.1%} of the source's {packed.source_bytes:,} bytes. "
            f"load_moe({str(packed.folder)!r})"
        )
    return 0


def _stored(packed: "Packed") -> str:
    """Say how experts are stored, and why."""
    if packed.num_lossless == packed.num_experts:
        return f"{packed.num_experts} experts without loss, every bit kept."
    if packed.num_lossless:
        kept = packed.num_experts - packed.num_lossless
        return (
            f"{packed.num_lossless} experts without loss, every bit kept; {kept} as they are, for they save too little."
        )
    return f"{packed.num_experts} experts as they are: {packed.why_floats}"


def _demo_model(arguments: argparse.Namespace) -> int:
    from moeflow.demo.model import build_demo_model

    folder = build_demo_model(arguments.out)
    print(json.dumps({"folder": str(folder)}) if arguments.json else folder)
    return 0
