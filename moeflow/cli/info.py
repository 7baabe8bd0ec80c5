"""`moeflow info`: this installation and machine, or a model's sizes as tables."""

import argparse
import importlib.metadata
import json
import platform
from typing import TYPE_CHECKING, Any

from moeflow import __version__
from moeflow.c_library import built_library
from moeflow.cli.model_argument import add_model_argument
from moeflow.errors import ConfigError
from moeflow.formatting import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Group, RenderableType
    from rich.table import Table

_LIBRARIES = ("torch", "transformers", "safetensors", "numpy")


def add_info_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `info` to the parser's commands."""
    info = commands.add_parser("info", help="what a model is and what each budget buys; or this machine")
    add_model_argument(info, "; without it, this installation and machine", optional=True)
    info.add_argument("--step", action="store_true", help="load the model, and print the program of its decode step")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    text: Callable[[dict[str, Any]], RenderableType | str]
    if arguments.model is None:
        if arguments.step:
            raise ConfigError("--step prints the program of a model's decode step: name the model.")
        about, text = describe_installation(), installation_text
    elif arguments.step:
        about, text = describe_step(arguments.model), step_text
    else:
        from moeflow.loading.describe import describe_model

        about, text = describe_model(arguments.model), model_text
    if arguments.json:
        print(json.dumps(about))
    else:
        from rich.console import Console

        shown = text(about)
        print(shown) if isinstance(shown, str) else Console().print(shown)
    return 0


def describe_step(model: str) -> dict[str, Any]:
    """Describe the program of a model's decode step; it is captured if it is not on the disk."""
    from transformers.utils import logging

    from moeflow.cli.options import preparing_step
    from moeflow.loading.load_moe import load_moe

    logging.disable_progress_bar()
    loaded = load_moe(model, device="cpu", predictor=None)
    with loaded.moeflow, preparing_step():
        return {"model": model, **loaded.moeflow.step.describe()}


def step_text(about: dict[str, Any]) -> str:
    """Lay `describe_step()` out as text."""
    if about["reason"] is not None:
        return f"{about['model']} decodes by its own code: {about['reason']}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in about["instructions"].items())
    origin = "from the disk" if about["from_disk"] else "captured now, and kept on disk"
    return f"{kinds}; {format_bytes(about['memory_bytes'])} beside the weights; {origin}\n{about['text']}"


def describe_installation() -> dict[str, Any]:
    """Describe versions, memory and GPUs without importing torch."""
    from moeflow import hardware
    from moeflow.demo.model import default_demo_path
    from moeflow.kernels import cpu
    from moeflow.machine.gpus import gpu_names, visible_devices

    demo = default_demo_path()
    return {
        "moeflow": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
        "memory_limit_bytes": hardware.memory_limit_bytes(),
        "memory_available_bytes": hardware.available_memory_bytes(),
        "gpus": gpu_names(),
        "cuda_visible_devices": visible_devices(),
        "cpu_kernels_built": _is_built("_cpu", cpu.__file__),
        "demo_model": str(demo),
        "demo_model_built": demo.is_dir(),
    }


def installation_text(about: dict[str, Any]) -> "Table":
    """Lay `describe_installation()` out as a rich table."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in about.items():
        if name.endswith("_bytes"):
            name, value = name.removesuffix("_bytes"), format_bytes(value)
        elif name == "gpus":
            value = "; ".join(value) or "none"
        elif name == "cuda_visible_devices":
            if value is None:
                continue
            value = repr(value)
        elif name == "cpu_kernels_built":
            value = "yes" if value else "no: experts run in torch. Install moeflow again where there is a C++ compiler"
        elif name == "demo_model_built":
            value = "yes" if value else "no, moeflow chat builds it"
        table.add_row(name.replace("_", " "), str(value))
    return table


def model_text(about: dict[str, Any]) -> "Group":
    """Lay `describe_model()` out as rich tables."""

    from rich.console import Group
    from rich.table import Table

    facts = Table(show_header=False, box=None)
    machine = about["machine"]
    expert = about["expert_bytes"]
    largest = max(expert) if isinstance(expert, list) else expert
    for name, value in (
        ("model", f"{about['model']} ({about['model_type']}{', packed' if about['packed'] else ''})"),
        *_gguf_rows(about["gguf"]),
        ("layers", f"{about['layers']}, of which {about['moe_layers']} have routed experts"),
        (
            "experts",
            f"{about['num_experts']} ({about['experts_per_layer']} a layer, {about['num_experts_per_tok']} a token)",
        ),
        ("an expert", f"{format_bytes(largest)} ({about['dtype']})"),
        ("all experts", format_bytes(about["experts_bytes"])),
        *_lossless_row(about["lossless"]),
        ("everything else", format_bytes(about["dense_bytes"])),
        ("smallest budget", f"{format_bytes(about['minimum_bytes'])} ({about['minimum_bytes']:,} bytes)"),
        ("memory free here", format_bytes(machine["memory_available_bytes"])),
        ("GPUs", "; ".join(machine["gpus"]) or "none"),
        *((f"link out of the folder: {name}", target) for name, target in about["links_out"].items()),
    ):
        facts.add_row(name, str(value))
    budgets = Table(
        "budget", "bytes", "slots", "experts a layer", title="what expert_memory buys", title_justify="left"
    )
    for row in about["budgets"]:
        per_layer = f"{row['resident_experts_per_layer']:g}" if row["runs"] else "too small"
        budgets.add_row(f"{row['share_percent']:g}%", format_bytes(row["bytes"]), str(row["slots"]), per_layer)
    return Group(facts, "", budgets)


def _gguf_rows(gguf: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the rows about a GGUF file; none where the model is not in one."""
    if gguf is None:
        return []
    files = f", in {gguf['files']} files" if gguf["files"] > 1 else ""
    types = "; ".join(
        f"{part}: {', '.join(f'{kind} {format_bytes(size)}' for kind, size in held.items())}"
        for part, held in gguf["types"].items()
    )
    return [("GGUF", f"architecture {gguf['architecture']}{files}"), ("types", types)]


def _lossless_row(saving: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the row about lossless experts; none where nothing is known of them."""
    if saving is None:
        return []
    taken = f"{saving['share']:.1%} of these bytes"
    if saving["share"] == 1:
        taken = "no smaller: their exponents differ too much"
    elif not saving["experts_read"]:
        taken += " at best"
    else:
        taken += f", by the exponents of {saving['experts_read']} experts"
        if saving["built"]:
            taken += ": moeflow pack"
    if not saving["built"]:
        taken += f" (not built for {saving['dtype']}, only for BF16)"
    return [("lossless", taken)]


def _is_built(library: str, beside: str) -> bool:
    try:
        built_library(library, beside)
    except FileNotFoundError:
        return False
    return True


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
