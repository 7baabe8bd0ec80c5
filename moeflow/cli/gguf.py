"""`moeflow gguf`: a model as one GGUF file."""

import argparse
import json

KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")
EXPERT_KINDS = (*KINDS, "mxfp4")


def add_gguf_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("gguf", help="write a model as a GGUF file, as llama.cpp reads it")
    command.add_argument("model", help="hub id or folder, packed and quantised ones too")
    command.add_argument("-o", "--out", required=True, metavar="FILE", help="file to write; replaced when it is whole")
    command.add_argument("--type", default="f16", choices=KINDS, help="of the matrices (f16)")
    command.add_argument(
        "--experts", choices=EXPERT_KINDS, help="of the routed experts' matrices (that of --type); mxfp4 for gpt-oss"
    )
    command.add_argument(
        "--pre", metavar="NAME", help="llama.cpp's name of the way that the tokenizer cuts text (told from its file)"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_gguf)


def _gguf(arguments: argparse.Namespace) -> int:
    from moeflow.cli.progress import bytes_progress
    from moeflow.convert.gguf import write_gguf

    with bytes_progress(f"writing {arguments.out}") as progress:
        written = write_gguf(
            arguments.model,
            arguments.out,
            arguments.type,
            experts=arguments.experts,
            pre=arguments.pre,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps({**written._asdict(), "file": str(written.file)}))
    else:
        print(
            f"wrote {written.file}, {written.num_bytes:,} bytes: {written.num_tensors} tensors, "
            f"architecture {written.architecture}"
        )
    return 0
