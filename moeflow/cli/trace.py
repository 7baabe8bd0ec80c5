"""`moeflow trace`: record, convert and describe routing traces; replays have their own file."""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moeflow.atomic_file import check_target
from moeflow.cli.model_argument import add_model_argument
from moeflow.cli.options import add_loading_options, load_model
from moeflow.cli.prompts import Prompt, read_prompts
from moeflow.cli.replay import add_replay_commands
from moeflow.errors import MoeflowError, TraceError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from moeflow.offload.runtime import ExpertRuntime


def add_trace_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `trace` and its commands to the parser's commands."""
    trace = commands.add_parser("trace", help="routing traces: which experts every token is routed to")
    below = trace.add_subparsers(title="commands", metavar="COMMAND", required=True)

    record = below.add_parser(
        "record", help="answer prompts and write which experts each token took; a killed run is continued"
    )
    add_model_argument(record)
    record.add_argument(
        "--prompts", required=True, metavar="FILE", help="text, one prompt a line, or .jsonl with prompts or messages"
    )
    record.add_argument("-o", "--out", required=True, metavar="T", help="trace to write")
    record.add_argument("--append", action="store_true", help="go on with a trace of the same model")
    record.add_argument("--lookahead", action="store_true", help="write too what the next layers' routers say early")
    record.add_argument("--limit", type=int, metavar="N", help="most prompts to take; without it all")
    record.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens of an answer (128)")
    add_loading_options(record)
    record.set_defaults(run=_record)

    convert = below.add_parser("convert", help="make a trace of a recording in another form")
    convert.add_argument("source", help="folder with an .npz and sequences.json (gpt-oss-20b), or a .jsonl file")
    convert.add_argument("-o", "--out", required=True, metavar="T", help="trace to write")
    convert.add_argument("--fingerprint", metavar="NAME", help="which model it is of; without it, the source's name")
    convert.add_argument("--num-experts", type=int, metavar="N", help="experts a layer, where the source is .jsonl")
    convert.add_argument("--json", action="store_true", help="print one JSON object")
    convert.set_defaults(run=_convert)

    info = below.add_parser("info", help="what a trace holds")
    info.add_argument("trace", help="a trace file")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=_info)

    add_replay_commands(below)


def _record(arguments: argparse.Namespace) -> int:
    from moeflow.trace.header import read_recording

    prompts = read_prompts(arguments.prompts, limit=arguments.limit)
    out, name = Path(arguments.out), _recording_name(arguments, prompts)
    earlier = read_recording(out)
    continues = earlier is not None and (earlier.name, earlier.of) == (name, len(prompts))
    if not continues and not arguments.append and out.exists() and out.stat().st_size:
        raise TraceError(
            f"{out} exists already, and is not of these prompts, this model and these options. Give --append to go on "
            "with it, or another name."
        )
    if continues and earlier is not None and earlier.prompts == earlier.of and not arguments.append:
        num_before, num_tokens = earlier.prompts, 0
        print(f"{out} has all of these prompts already; --append records them once more.", file=sys.stderr)
    else:
        check_target(out, TraceError)
        num_before, num_tokens = _record_prompts(arguments, prompts, out, name)
    if arguments.json:
        about = {"trace": str(out), "prompts": len(prompts), "prompts_before": num_before, "tokens": num_tokens}
        print(json.dumps(about))
    else:
        before = f", {num_before:,} of them recorded before" if num_before else ""
        print(f"wrote {out}: {num_tokens:,} tokens of {len(prompts):,} prompts{before}")
    return 0


def _recording_name(arguments: argparse.Namespace, prompts: list[Prompt]) -> str:
    """Return a name of what the rows of a recording depend on: the model, by name wherever it lies, and the rest."""
    options = ("dtype", "quantization", "prune", "miss", "lookahead", "max_new_tokens")
    inputs = [Path(arguments.model).resolve().name, [str(getattr(arguments, name)) for name in options], prompts]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def _record_prompts(arguments: argparse.Namespace, prompts: list[Prompt], out: Path, name: str) -> tuple[int, int]:
    """Record the prompts that are not in the trace yet; return how many were, and the tokens of the others."""
    from moeflow.chat.answer import checkpoint_params, stream_answer
    from moeflow.cli.progress import count_progress
    from moeflow.trace.recorder import attach_recorder

    model, tokenizer = load_model(arguments.model, arguments)
    runtime = cast("ExpertRuntime", model.moeflow)  # transformers types it as a module
    with runtime, count_progress("recording") as progress:
        encoded = _encoded(tokenizer, prompts)
        recorder = attach_recorder(model, out, lookahead=arguments.lookahead)
        num_before = recorder.begin_recording(name, len(prompts))
        before = recorder.num_tokens
        params = checkpoint_params(model, max_new_tokens=arguments.max_new_tokens, temperature=0)
        for number, input_ids in enumerate(encoded[num_before:], num_before):
            progress(number, len(prompts))
            with stream_answer(model, tokenizer, input_ids, params) as stream:
                for _ in stream:
                    pass
            recorder.end_prompt()
        progress(len(prompts), len(prompts))
        return num_before, recorder.num_tokens - before


def _encoded(tokenizer: "PreTrainedTokenizerBase", prompts: list[Prompt]) -> "list[torch.Tensor]":
    """Return the token ids of all prompts, [1, num_prompt_tokens] each, before the first of them is recorded."""
    from moeflow.chat.conversation import Conversation

    encoded = []
    for number, prompt in enumerate(prompts, 1):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            encoded.append(Conversation(turns=messages).encode(tokenizer))
        except MoeflowError as error:
            raise MoeflowError(f"prompt {number} of {len(prompts):,}: {error}") from error
    return encoded


def _convert(arguments: argparse.Namespace) -> int:
    from moeflow.trace.convert import convert_trace

    num_tokens = convert_trace(
        arguments.source, arguments.out, fingerprint=arguments.fingerprint, num_experts=arguments.num_experts
    )
    if arguments.json:
        print(json.dumps({"trace": arguments.out, "tokens": num_tokens}))
    else:
        print(f"wrote {arguments.out}: {num_tokens:,} tokens")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from moeflow.trace.format import DECODE
    from moeflow.trace.trace import RoutingTrace

    trace = RoutingTrace.open(arguments.trace)
    num_decode = int((trace.phase == DECODE).sum())
    about = {
        "trace": arguments.trace,
        "fingerprint": trace.fingerprint,
        "source": trace.format.source,
        "num_layers": trace.num_layers,
        "num_experts": list(trace.experts_per_layer),
        "top_k": trace.top_k,
        "tokens": len(trace),
        "prefill_tokens": len(trace) - num_decode,
        "decode_tokens": num_decode,
        "sequences": len(trace.sequence_numbers),
        "sequence_facts": len(trace.sequence_facts),
        "has_weights": trace.format.has_weights,
        "ranked": trace.format.ranked,
        "lookahead": trace.format.lookahead,
        "bytes": Path(arguments.trace).stat().st_size,
    }
    if arguments.json:
        print(json.dumps(about))
        return 0
    counts = sorted(set(trace.experts_per_layer))
    experts = " to ".join(map(str, counts[:1] + counts[1:][-1:]))
    weights = "with weights" if trace.format.has_weights else "without weights"
    print(f"model      {trace.fingerprint}")
    print(f"source     {trace.format.source}")
    print(f"layers     {trace.num_layers}, {experts} experts each, {trace.top_k} of them a token")
    print(f"tokens     {len(trace):,}: {len(trace) - num_decode:,} prefill, {num_decode:,} decode")
    print(f"sequences  {len(trace.sequence_numbers):,}, facts of {len(trace.sequence_facts):,}")
    print(f"ranks      {'by falling weight' if trace.format.ranked else 'in no order'}, {weights}")
    if trace.format.lookahead is not None:
        print(f"lookahead  {trace.format.lookahead[0]} layers, {trace.format.lookahead[1]} experts each")
    print(f"bytes      {about['bytes']:,}")
    return 0
