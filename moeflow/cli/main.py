"""The command line: parses, calls the library, and turns its errors into one line.

torch and transformers are imported by the commands that need them, so that --help answers at once.
"""

import argparse
import json
import sys

from moeflow import __version__
from moeflow.cli.batch import add_batch_command
from moeflow.cli.options import add_loading_options, load_model
from moeflow.cli.parallel import add_parallel_command
from moeflow.cli.place import add_place_command
from moeflow.cli.predictor import add_predictor_commands
from moeflow.cli.quantize import add_quantize_command
from moeflow.cli.tiers import add_tiers_command
from moeflow.cli.trace import add_trace_commands
from moeflow.errors import ConfigError, MoeflowError


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; sys.argv's when None.

    Returns:
        The exit code: 0, 1 for an error that was told in one line, 130 for Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except MoeflowError as error:
        print(f"moeflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moeflow: interrupted", file=sys.stderr)
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

    chat = commands.add_parser("chat", help="chat in the terminal, or answer one piped prompt")
    chat.add_argument("model", nargs="?", help="hub id or folder; without it the demo model, built on first use")
    chat.add_argument("--system", help="system prompt")
    _add_sampling(chat)
    add_loading_options(chat)
    chat.add_argument("--plain", action="store_true", help="no colours, no markdown")
    chat.add_argument("--yes", action="store_true", help="build the demo model without asking")
    chat.set_defaults(run=_chat)

    generate = commands.add_parser("generate", help="continue a text as it is, without a chat template")
    generate.add_argument("model", help="hub id or folder")
    generate.add_argument("prompt", nargs="?", help="the text; without it, standard input")
    _add_sampling(generate)
    add_loading_options(generate)
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="what a model is and what each budget buys, from headers; or this machine")
    info.add_argument("model", nargs="?", help="hub id or folder; without it, this installation and machine")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    pack = commands.add_parser("pack", help="write a folder whose experts are one aligned, checksummed read each")
    pack.add_argument("model", help="hub id or folder")
    pack.add_argument("out", help="folder to write; a killed run is continued by the next")
    pack.add_argument("--json", action="store_true", help="print one JSON object")
    pack.set_defaults(run=_pack)

    add_batch_command(commands)
    add_quantize_command(commands)
    add_trace_commands(commands)
    add_predictor_commands(commands)
    add_parallel_command(commands)
    add_place_command(commands)
    add_tiers_command(commands)

    demo = commands.add_parser("demo-model", help="build the demo model: 480 experts, 1.4 GB, no hub needed")
    demo.add_argument("out", nargs="?", help="folder to write; without it the user's cache directory")
    demo.add_argument("--json", action="store_true", help="print one JSON object")
    demo.set_defaults(run=_demo_model)
    return parser


def _add_sampling(parser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens of an answer (512)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; without it the checkpoint's")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from this share of the probability")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the sampling")


def _chat(arguments) -> int:
    from moeflow.chat.chat import run_chat

    if arguments.json and sys.stdin.isatty():
        raise ConfigError("--json is for one piped prompt, as in: echo hello | moeflow chat --json")
    source = arguments.model or _ensure_demo_model(arguments.yes)
    model, tokenizer = load_model(source, arguments)
    with model.moeflow:
        return run_chat(
            model,
            tokenizer,
            system=arguments.system,
            plain=arguments.plain or None,
            as_json=arguments.json,
            name=str(source),
            **_sampling(arguments),
        )


def _generate(arguments) -> int:
    from moeflow.chat.answer import stream_answer
    from moeflow.chat.screen import write_pieces
    from moeflow.formatting import answer_figures, stats_line

    prompt = arguments.prompt if arguments.prompt is not None else sys.stdin.read().rstrip("\r\n")
    if not prompt.strip():
        raise ConfigError("the prompt is empty: give it as the second argument, or pipe it in.")
    model, tokenizer = load_model(arguments.model, arguments)
    with model.moeflow:
        input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        before = model.moeflow.stats()
        with stream_answer(model, tokenizer, input_ids, **_sampling(arguments)) as stream:
            if arguments.json:
                list(stream)
            else:
                write_pieces(stream, sys.stdout)
        after = model.moeflow.stats()
    if arguments.json:
        print(json.dumps(answer_figures(before, after, stream.answer), ensure_ascii=sys.stdout.isatty()))
    else:
        print(stats_line(before, after, stream.answer), file=sys.stderr)
    return 0


def _sampling(arguments) -> dict:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return {name: getattr(arguments, name) for name in names}


def _info(arguments) -> int:
    from moeflow.cli.info import describe_installation, installation_text, model_text

    if arguments.model is None:
        about, text = describe_installation(), installation_text
    else:
        from moeflow.loading.describe import describe_model

        about, text = describe_model(arguments.model), model_text
    if arguments.json:
        print(json.dumps(about))
    else:
        from rich.console import Console

        Console().print(text(about))
    return 0


def _pack(arguments) -> int:
    from moeflow.cli.progress import bytes_progress
    from moeflow.convert.pack import pack_model

    with bytes_progress(f"packing {arguments.model}") as progress:
        folder = pack_model(arguments.model, arguments.out, progress=progress)
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    if arguments.json:
        print(json.dumps({"folder": str(folder), "bytes": num_bytes}))
    else:
        print(f"wrote {folder}, {num_bytes:,} bytes: load_moe({str(folder)!r})")
    return 0


def _demo_model(arguments) -> int:
    from moeflow.demo.model import build_demo_model

    folder = build_demo_model(arguments.out)
    print(json.dumps({"folder": str(folder)}) if arguments.json else folder)
    return 0


def _ensure_demo_model(yes: bool) -> str:
    """Return the demo model's folder, building it once the user knows what that takes."""
    from moeflow.demo.model import build_demo_model, default_demo_path, describe_demo_model
    from moeflow.formatting import format_bytes

    folder = default_demo_path()
    if not folder.is_dir():
        card = describe_demo_model()
        low, high = card.expected_minutes
        fetched, memory, disk, kept = map(
            format_bytes, (card.download_bytes, card.memory_bytes, card.disk_bytes, card.checkpoint_bytes)
        )
        print(
            f"The demo model is not on this machine yet. Building it fetches {fetched} ({card.source}), takes {low} "
            f"to {high} minutes on two cores, up to {memory} of memory and {disk} of disk, of which {kept} "
            f"stay, in {card.path}. Stop at any time; the next run goes on from there.",
            file=sys.stderr,
        )
        if sys.stdin.isatty() and not yes and input("Build it now? [Y/n] ").strip().lower() not in ("", "y", "yes"):
            raise MoeflowError("no model: give one, as in moeflow chat org/name, or build the demo model later.")
        build_demo_model()
    return str(folder)
