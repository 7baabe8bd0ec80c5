"""`moeflow chat` and `moeflow generate`: one answer at a time.

torch, transformers and rich are imported by the commands, not by their arguments.
"""

import argparse
import json
import sys

from moeflow.chat.answer import MAX_NEW_TOKENS
from moeflow.cli.model_argument import add_model_argument
from moeflow.cli.options import add_loading_options, add_sampling_options, given_sampling, load_model, prepare_step
from moeflow.errors import ConfigError, MoeflowError


def add_chat_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `chat` and `generate` to the parser's commands."""
    chat = commands.add_parser("chat", help="chat in the terminal, or answer one piped prompt")
    add_model_argument(chat, "; without it the demo model, built on first use", optional=True)
    chat.add_argument("--system", help="system prompt")
    _add_sampling(chat)
    add_loading_options(chat)
    chat.add_argument("--plain", action="store_true", help="no colours, no markdown")
    chat.add_argument("--yes", action="store_true", help="build the demo model without asking")
    chat.set_defaults(run=_chat)

    generate = commands.add_parser("generate", help="continue a text as it is, without a chat template")
    add_model_argument(generate)
    generate.add_argument("prompt", nargs="?", help="the text; without it, standard input")
    _add_sampling(generate)
    add_loading_options(generate)
    generate.set_defaults(run=_generate)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    checkpoint = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    defaults = {"max_new_tokens": str(MAX_NEW_TOKENS)} | dict.fromkeys(checkpoint, "the checkpoint's")
    add_sampling_options(parser, leave_out=("logprobs", "prompt_logprobs"), defaults=defaults)


def _chat(arguments: argparse.Namespace) -> int:
    from moeflow.chat.answer import checkpoint_params
    from moeflow.chat.chat import run_chat
    from moeflow.hf.encoding import check_text

    if arguments.json and sys.stdin.isatty():
        raise ConfigError("--json is for one piped prompt, as in: echo hello | moeflow chat --json")
    if arguments.system is not None:
        check_text(arguments.system, "--system")
    given = given_sampling(arguments)
    source = ensure_demo_model(arguments.yes) if arguments.model is None else arguments.model
    model, tokenizer = load_model(source, arguments)
    with model.moeflow:
        prepare_step(model)
        return run_chat(
            model,
            tokenizer,
            checkpoint_params(model, **given),
            system=arguments.system,
            plain=arguments.plain or None,
            as_json=arguments.json,
            name=str(source),
        )


def _generate(arguments: argparse.Namespace) -> int:
    import torch

    from moeflow.chat.answer import checkpoint_params
    from moeflow.chat.answerer import Answerer
    from moeflow.chat.chat import read_prompt
    from moeflow.chat.figures import answer_figures, plan_lines, stats_line
    from moeflow.chat.screen import write_pieces
    from moeflow.hf.encoding import check_text, encode_text

    prompt = arguments.prompt if arguments.prompt is not None else read_prompt(sys.stdin)
    if not check_text(prompt, "the prompt").strip():
        raise ConfigError("the prompt is empty: give it as the second argument, or pipe it in.")
    given = given_sampling(arguments)
    model, tokenizer = load_model(arguments.model, arguments)
    with model.moeflow:
        prepare_step(model)
        input_ids = torch.tensor([encode_text(tokenizer, prompt)])
        before = model.moeflow.snapshot()
        with Answerer(model, tokenizer).stream(input_ids, checkpoint_params(model, **given)) as stream:
            if arguments.json:
                list(stream)
            else:
                write_pieces(stream, sys.stdout)
        after = model.moeflow.snapshot()
    assert stream.answer is not None, "an answer that was read to its end"
    if arguments.json:
        print(json.dumps(answer_figures(before, after, stream.answer), ensure_ascii=sys.stdout.isatty()))
    else:
        print(stats_line(before, after, stream.answer), file=sys.stderr)
        if (kept := plan_lines(after)) is not None:
            print(kept, file=sys.stderr)
    return 0


def ensure_demo_model(yes: bool) -> str:
    """Return the demo model's folder, building it once the user knows what that takes.

    Args:
        yes: build it without asking.
    """
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
            f"The demo model is not on this machine yet. Building it fetches {fetched} ({card.source}) and takes up to "
            f"{memory} of memory and {disk} of disk, of which {kept} stay, in {card.path}. On two cores it takes {low} "
            f"to {high} minutes, by their speed and what else they do. Stop at any time; the next run goes on from "
            "there.",
            file=sys.stderr,
        )
        if sys.stdin.isatty() and not yes and input("Build it now? [Y/n] ").strip().lower() not in ("", "y", "yes"):
            raise MoeflowError("no model: give one, as in moeflow chat org/name, or build the demo model later.")
        build_demo_model()
    return str(folder)
