"""`moeflow parallel`: continue prompts with the experts spread over several processes, one a GPU, under torchrun."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from moeflow.cli.model_argument import add_model_argument
from moeflow.cli.options import add_loading_options, load_model
from moeflow.cli.prompts import Prompt, read_prompts
from moeflow.errors import ConfigError
from moeflow.formatting import format_bytes, format_percent

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moeflow.expert_parallel.traffic import Traffic
    from moeflow.offload.runtime import ExpertRuntime

_LAUNCH = "torchrun --nproc-per-node 2 -m moeflow parallel MODEL PROMPT --plan PLAN"


def add_parallel_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser's commands."""
    parallel = commands.add_parser("parallel", help=f"spread the experts over several processes: {_LAUNCH}")
    add_model_argument(parallel, ", the same for every process")
    parallel.add_argument("prompt", nargs="?", help="a text to continue, greedily and without a chat template")
    parallel.add_argument(
        "--prompts",
        metavar="FILE",
        help="texts, one a line, or JSON lines with texts or messages; dealt out to the ranks",
    )
    parallel.add_argument("--plan", metavar="PLAN", help="written by moeflow place; without it, equal parts in order")
    parallel.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens of an answer (64)")
    add_loading_options(parallel, leave_out=("plan",))  # its --plan is of experts on ranks
    parallel.set_defaults(run=_parallel)


def _parallel(arguments: argparse.Namespace) -> int:
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise ConfigError("give one prompt, or --prompts FILE, not both.")
    prompts = read_prompts(arguments.prompts) if arguments.prompt is None else [arguments.prompt]
    if arguments.predictor == "auto":
        arguments.predictor = "none"  # a rank's memory serves other ranks' tokens
    with _process_group(arguments) as (rank, num_ranks):
        model, tokenizer = load_model(arguments.model, arguments)
        with cast("ExpertRuntime", model.moeflow):
            answers, traffic = _answer(model, tokenizer, prompts, rank, num_ranks, arguments)
    if not rank:
        _print(arguments, answers, traffic)
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is said and closed. An orderly end of the interpreter was seen to abort now and then, in the C++ of
    # the process group, and torchrun would take that for a failed rank.
    os._exit(0)


def _print(arguments: argparse.Namespace, answers: list[dict], traffic: Traffic) -> None:
    if arguments.json:
        print(json.dumps({"answers": answers, "traffic": traffic.as_dict()}))
        return
    from rich.console import Console

    for answer in answers:
        continued = answer["prompt"] if isinstance(answer["prompt"], str) else ""
        print(f"{continued}{answer['text']}\n")
    console = Console(stderr=True)
    console.print(_table(traffic))
    console.print(_summary(traffic))


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    rank: int,
    num_ranks: int,
    arguments: argparse.Namespace,
) -> tuple[list[dict], Traffic]:
    """Continue every num_ranks-th prompt here; return the answers to all, in order, and what was sent for them."""
    import torch
    import torch.distributed as dist

    from moeflow.chat.answer import checkpoint_params, stream_answer
    from moeflow.expert_parallel.expert_parallel import apply
    from moeflow.hf.encoding import encode_messages, encode_text

    spread, own = apply(model, arguments.plan), []
    params = checkpoint_params(model, max_new_tokens=arguments.max_new_tokens, temperature=0)
    with spread.session():
        for prompt in prompts[rank::num_ranks]:
            ids = encode_text(tokenizer, prompt) if isinstance(prompt, str) else encode_messages(tokenizer, prompt)
            input_ids = torch.tensor([ids])
            with stream_answer(model, tokenizer, input_ids, params) as stream:
                list(stream)
            assert stream.answer is not None, "an answer that was read to its end"
            figures = ("num_prompt_tokens", "num_new_tokens", "ttft_s", "tokens_per_s")
            facts = {name: getattr(stream.answer, name) for name in figures}
            own.append({"prompt": prompt, "text": stream.answer.text, "rank": rank, **facts})
    gathered: list[list[dict]] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(gathered, own)
    return [gathered[number % num_ranks][number // num_ranks] for number in range(len(prompts))], spread.stats()


@contextmanager
def _process_group(arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Join the other processes that torchrun started; choose this one's GPU. Yields rank and number of ranks."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"this process is no rank of several ({missing[0]} is not set). Start it as: {_LAUNCH}")
    import torch
    import torch.distributed as dist

    if arguments.device in ("auto", "cuda") and torch.cuda.is_available():
        arguments.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu and torch.cuda.is_available():
        torch.cuda.set_device(arguments.device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def _table(traffic: Traffic) -> Table:
    """Bytes from each rank to each: hidden states to experts, and outputs back."""
    from rich.table import Table

    dispatch, combine = traffic.dispatch_bytes.sum(axis=0).tolist(), traffic.combine_bytes.sum(axis=0).tolist()
    table = Table("dispatch + combine", *(f"to rank {rank}" for rank in range(len(dispatch))))
    for source, sent in enumerate(zip(dispatch, combine, strict=True)):
        cells = (f"{format_bytes(there)} + {format_bytes(back)}" for there, back in zip(*sent, strict=True))
        table.add_row(f"from rank {source}", *cells)
    return table


def _summary(traffic: Traffic) -> str:
    sent = (traffic.dispatch_bytes + traffic.combine_bytes).sum(axis=0)
    crossing = (sent.sum() - sent.trace()) / max(sent.sum(), 1)
    beside = format_bytes(int(traffic.metadata_bytes[0, 0]))
    return f"{format_percent(crossing)} crossed; beside it {beside} of counts a pair, in {traffic.rounds:,} rounds"
