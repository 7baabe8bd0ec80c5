"""`moeflow fit`: what a model takes and how fast it runs here, before it is downloaded or loaded.

rich is imported by the command, not by its arguments; torch only where the machine has to be measured.
"""

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING

from moeflow.cli.model_argument import add_model_argument
from moeflow.formatting import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from moeflow.fit.fit import Survey
    from moeflow.fit.hit_curves import Range
    from moeflow.fit.rows import Row

_WRITES = {
    "lossless": "moeflow pack {model} {out} --lossless",
    "int8": "moeflow quantize {model} {out} --bits 8 --method rtn",
    "int4": "moeflow quantize {model} {out} --bits 4",
    "mixed at 3 bits": "moeflow quantize {model} {out} --average-bits 3",
}


def add_fit_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `fit` to the parser's commands."""
    fit = commands.add_parser("fit", help="what a model takes here and how fast it runs, before it is downloaded")
    add_model_argument(fit, "; only headers are read")
    fit.add_argument("--context", type=int, metavar="N", help="positions of a sequence, prompt and answer (4096)")
    fit.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (1)")
    fit.add_argument("--device", default="auto", help='"auto" or "cpu"; plans are made for the CPU only')
    fit.add_argument(
        "--memory", metavar="LIMIT", help='that the whole process may take: bytes or "6GiB" (what is free)'
    )
    fit.add_argument("--disk", metavar="FOLDER", help="a folder on the disk that experts are read from (the model's)")
    fit.add_argument("--target", type=float, metavar="TOK_S", help="tokens a second that decoding must reach")
    fit.add_argument("--trace", metavar="FILE", help="a routing trace of the model, for its hit rates")
    fit.add_argument("-o", "--out", metavar="PLAN", help="write the recommended plan, for --plan of chat and others")
    fit.add_argument("--json", action="store_true", help="print one JSON object")
    fit.set_defaults(run=_fit, reads_headers=True)


def _fit(arguments: argparse.Namespace) -> int:
    from moeflow.fit.fit import survey

    found = survey(
        arguments.model,
        context=arguments.context,
        batch=arguments.batch,
        device=arguments.device,
        memory=arguments.memory,
        disk=arguments.disk,
        target=arguments.target,
        trace=arguments.trace,
        gguf_file=arguments.gguf_file,
        tell=lambda text: print(f"moeflow: {text}", file=sys.stderr),
    )
    row = found.recommended
    reached = row is not None and (found.wish.target_tok_s or 0) <= row.decode_tok_s.mid
    if arguments.out is not None and row is not None:
        found.plan().save(arguments.out)
    if arguments.json:
        print(json.dumps(_about(found)))
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 180)
        console.print(survey_table(found))
        print(advice(found, arguments.out))
    return 0 if reached else 1


def _about(found: "Survey") -> dict:
    plan = None if found.recommended is None else found.plan()
    return {
        "model": found.model,
        "model_type": found.sizes.config.model_type,
        "memory_bytes": found.wish.memory_bytes,
        "context": found.wish.context,
        "batch": found.wish.batch,
        "prompt_tokens": found.wish.prompt_tokens,
        "curve": found.curve.source,
        "machine": found.profile.hardware,
        "fits": found.recommended is not None,
        "recommended": None if found.recommended is None else found.rows.index(found.recommended),
        "commands": None if found.recommended is None else commands_for(found),
        "plan": None if plan is None else json.loads(plan.to_json())["plan"],
        "rows": [row.as_dict() for row in found.rows],
    }


def survey_table(found: "Survey") -> "Table":
    """Lay all rows out as one table; the recommended one is marked."""
    from rich import box
    from rich.table import Table

    sizes, wish = found.sizes, found.wish
    title = (
        f"{found.model}: {sizes.config.model_type}, {len(sizes.layers)} layers with experts, {sizes.num_experts:,} "
        f"experts, {sizes.top_k} a token · {wish.context:,} positions x {wish.batch} · {found.profile.hardware}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("experts")
    for name in ("disk", "dense", "resident", "KV", "activ.", "staging", "process", "sum", "of", "prefill", "decode"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    last = None
    for row in found.rows:
        if last is not None and row.form is not last:
            table.add_section()
        label = row.form.name if row.form is not last else ""
        last = row.form
        table.add_row(
            f"{label}",
            format_bytes(row.disk_bytes),
            format_bytes(row.lines["dense"]),
            f"{format_bytes(row.lines['experts'])} ({100 * row.share:.3g}%)",
            format_bytes(row.lines["key_values"]),
            format_bytes(row.lines["activations"] + row.lines["workspace"]),
            format_bytes(row.lines["pinned"]),
            format_bytes(row.lines["process"]),
            format_bytes(row.total_bytes),
            format_bytes(row.memory_bytes),
            speed_range(row.prefill_tok_s),
            speed_range(row.decode_tok_s),
            verdict(row),
            style="bold green" if row is found.recommended else None if row.fits else "dim",
        )
    return table


def speed_range(speed: "Range") -> str:
    """Write a speed with its range."""
    return f"{speed.mid:.3g} ({speed.low:.2g}-{speed.high:.2g})"


def verdict(row: "Row") -> str:
    """Say whether a row fits, fits once experts are written anew, or how much it is short of."""
    if not row.fits:
        return f"does not fit, short by {format_bytes(row.short_bytes)}"
    if row.form.is_published:
        return "fits"
    return "fits if written so"


def commands_for(found: "Survey", plan_file: str | None = None) -> list[str]:
    """Return the lines that run the recommended row: writing the experts anew where it needs that, chat, Python."""
    row = found.recommended
    assert row is not None, "a row was recommended"
    model, lines = found.model, []
    flag = option = ""
    if found.gguf_file is not None:
        flag, option = f" --gguf-file {shlex.quote(found.gguf_file)}", f", gguf_file={found.gguf_file!r}"
    if not row.form.is_published:
        out = f"{model.rstrip('/').rpartition('/')[2]}-{row.form.kernel}"
        lines.append(_WRITES[row.form.name].format(model=f"{shlex.quote(model)}{flag}", out=shlex.quote(out)))
        model, flag, option = out, "", ""
    if plan_file is not None:
        return [
            *lines,
            f"moeflow chat {shlex.quote(model)}{flag} --plan {shlex.quote(plan_file)}",
            f"load_moe({model!r}{option}, plan={plan_file!r})",
        ]
    experts, values = row.lines["experts"], row.lines["key_values"]
    return [
        *lines,
        f"moeflow chat {shlex.quote(model)}{flag} --device cpu --expert-memory {experts}",
        f"load_moe({model!r}{option}, device='cpu', expert_memory={experts}, kv_memory={values})",
    ]


def advice(found: "Survey", plan_file: str | None = None) -> str:
    """Recommend a row in a sentence, with its commands; or say what is missing."""
    from moeflow.fit.fit import out_of_reach

    row, wish = found.recommended, found.wish
    if row is None:
        return found.why_not()
    exact = "nothing is lost" if row.form.is_exact else "lossy"
    text = (
        f"Take {row.form.name} with {format_bytes(row.lines['experts'])} for experts ({exact}): it takes "
        f"{format_bytes(row.total_bytes)} of {format_bytes(wish.memory_bytes)}, and decodes about "
        f"{row.decode_tok_s.mid:.3g} tok/s ({row.decode_tok_s.low:.2g} to {row.decode_tok_s.high:.2g}), at a hit rate "
        f"of {row.hit_rate.mid:.0%} by {found.curve.source}."
    )
    if wish.target_tok_s is not None and row.decode_tok_s.mid < wish.target_tok_s:
        text = out_of_reach(found)
    return "\n".join([text, *(f"  {line}" for line in commands_for(found, plan_file))])
