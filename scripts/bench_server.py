"""Measure `moeflow serve`: the second turn of a conversation, throughput, structured output, arrivals, and a soak.

Servers run in processes of their own (`python -m moeflow serve`), clients in this one, on the CPU of one machine. Each
figure has its baseline in the same run, in turns where both can. The soak runs a tiny random model in this process.

    python scripts/bench_server.py [--only second-turn,throughput,structure,arrivals,soak] [--model FOLDER]

For llama.cpp's row of the arrivals: python -m venv llama && llama/bin/pip install "llama-cpp-python[server]", and
--llama-python llama/bin/python. The last line is one JSON object.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from bench.machine import describe, print_card, software
from bench.server import arrivals, second_turn, soak_run, structure, throughput
from moeflow.machine.others_load import OthersLoad

FIGURES = {
    "second-turn": second_turn,
    "throughput": throughput,
    "structure": structure,
    "arrivals": arrivals,
    "soak": soak_run,
}
TRACE = Path("requests", "AzureLLMInferenceTrace_conv.csv")


def main(argv: list[str] | None = None) -> int:
    """Print each figure, and one JSON object as the last line."""
    arguments = parse_arguments(argv)

    from transformers.utils import logging

    from moeflow.errors import MoeflowError

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end then too
    logging.disable_progress_bar()
    card = {"model": str(arguments.model), "threads": arguments.threads, "memory": arguments.memory}
    card |= describe("torch", "transformers", "fastapi", "uvicorn", "llguidance")
    found: dict = {}
    print_card(
        {
            "model": f"{arguments.model}, {arguments.memory} of the experts in memory",
            "machine": f"{card['cpu']}, {card['cores']} cores, {arguments.threads} threads, load {card['load']:.1f}",
            "software": software(card),
        }
    )
    try:
        for name in arguments.only:
            print(f"{name}:", flush=True)
            others, begin_s = OthersLoad(), time.perf_counter()
            found[name] = FIGURES[name].measure(arguments)
            found[name] |= {"seconds": time.perf_counter() - begin_s, "others": others.share()}
            for line in FIGURES[name].lines(found[name]):
                print(f"  {line}", flush=True)
    except KeyboardInterrupt:
        print("bench: stopped", file=sys.stderr)
        return 130
    except (MoeflowError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"card": card, **found}))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    from moeflow.demo.model import default_demo_path
    from moeflow.paths import cache_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=_names, default=[*FIGURES], metavar="NAMES", help=f"of {','.join(FIGURES)} (all)")
    add("--model", type=Path, default=default_demo_path(), metavar="FOLDER", help="a checkpoint (the demo model)")
    add("--memory", default="25%", help="expert_memory of moeflow (25%%)")
    add("--threads", type=int, default=_threads(), metavar="N", help="of each engine's arithmetic (OMP_NUM_THREADS)")
    add("--rounds", type=int, default=4, metavar="N", help="measured turns of second-turn and throughput (4)")
    add("--conversation", type=int, default=1000, metavar="N", help="tokens of a first turn (1000)")
    add("--clients", type=int, default=16, metavar="N", help="at once, of throughput (16)")
    add("--tokens", type=int, default=48, metavar="N", help="of each of their answers (48)")
    add("--answers", type=int, default=200, metavar="N", help="bound by schemas, of structure (200)")
    add("--requests", type=Path, default=_trace(), metavar="FILE", help="trace of arrivals, in Azure's form")
    add("--arrivals", type=int, default=40, metavar="N", help="requests replayed (40)")
    add("--load", type=float, default=0.7, metavar="X", help="share of what moeflow can do at which they come (0.7)")
    add("--slack", type=float, default=5.0, metavar="X", help="times as long as unloaded that is in time (5)")
    add("--llama-python", metavar="FILE", help="a Python that has llama-cpp-python[server]")
    add("--work", type=Path, default=cache_folder() / "bench", metavar="FOLDER", help="for the GGUF file")
    add("--soak-requests", type=int, default=1000, metavar="N", help="of soak (1000)")
    arguments = parser.parse_args(argv)
    for name in ("threads", "rounds", "conversation", "clients", "tokens", "answers", "arrivals", "soak_requests"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not arguments.load > 0 or not arguments.slack > 0:
        parser.error("--load and --slack must be more than 0")
    return arguments


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in FIGURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FIGURES)}")
    return names


def _threads() -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))


def _trace() -> Path:
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("MOEFLOW_TEST_DATA", shared)) / TRACE


if __name__ == "__main__":
    sys.exit(main())
