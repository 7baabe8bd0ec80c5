"""Measure the speed of two checkouts of moeflow in turns, and check that both give the same tokens.

    python scripts/bench_before_after.py --before FOLDER [--after FOLDER] [--expert-memory 100% 25%] [--prompts 8 512]

Each checkout has one worker process, with the checkout alone on PYTHONPATH and the same Python, which keeps its model
loaded. The two decode the same prompt greedily, one after the other, the first of a round in turn. A ratio is speed
before / speed after in one round: below 1 the second checkout is faster. Exits with 1 where tokens differ.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.device import add_device
from bench.machine import describe, print_card, software
from bench.rounds import quotients, ranged, spread
from bench.token_times import TokenTimes

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The history of the steam engine begins long before the railways. In the first century,"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, or one worker of it; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="a checkout with its compiled libraries")
    parser.add_argument("--after", type=Path, metavar="FOLDER", default=ROOT, help="the other one (this checkout)")
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint (the demo model)")
    parser.add_argument(
        "--expert-memory", nargs="+", default=["100%", "25%"], metavar="SIZE", help="budgets (100%% 25%%)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", default=48, help="of an answer (48); the time counts from the first on"
    )
    parser.add_argument(
        "--prompts", type=int, nargs="+", metavar="N", default=[], help="lengths of prompts to a first token"
    )
    parser.add_argument("--rounds", type=int, metavar="N", default=9, help="answers of each checkout and budget (9)")
    parser.add_argument("--dtype", default="bfloat16", help="of the model (bfloat16)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads; without it torch's own choice")
    add_device(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        work()
        return 0
    if arguments.before is None:
        parser.error("--before FOLDER is missing: a checkout of moeflow to compare with")
    folders = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    for folder in folders.values():
        if not (folder / "moeflow" / "__init__.py").is_file():
            parser.error(f"{folder} is no checkout of moeflow: it has no moeflow/__init__.py")
    if arguments.tokens < 2 or arguments.rounds < 1:
        parser.error("--tokens must be at least 2, --rounds at least 1")
    if arguments.model is None:
        from moeflow.demo.model import default_demo_path

        arguments.model = str(default_demo_path())
    card = run_card(arguments, folders)
    print_card(card_lines(card))
    workers: dict[str, Worker] = {}
    try:
        for side, folder in folders.items():
            workers[side] = Worker(side, folder, arguments.threads)
        rows = [measure(workers, budget, arguments, card) for budget in arguments.expert_memory]
    except WorkerEnded as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for worker in workers.values():
            worker.close()
    print(json.dumps({"card": card, "rows": rows}))
    return 0 if all(row["same_tokens"] for row in rows) else 1


def run_card(arguments: argparse.Namespace, folders: dict[str, Path]) -> dict:
    """Return the card: both checkouts, the machine, the bytes of a token's experts, the read bandwidth."""
    from bench.engines import ModelSize
    from moeflow.checkpoint.headers import open_checkpoint

    return {
        "model": arguments.model,
        **{side: {"folder": str(folder), "commit": commit_of(folder)} for side, folder in folders.items()},
        "dtype": arguments.dtype,
        "device": arguments.device,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        **describe("torch", "transformers"),
        "expert_bytes_a_token": ModelSize.of(open_checkpoint(arguments.model)).token_bytes,
        "read_bytes_per_s": find_bandwidth(arguments.device),
    }


def find_bandwidth(device: str) -> float | None:
    """Return the bytes a second that are read from a device's memory; None on a CPU without compiled kernels."""
    from bench import ceilings
    from bench.device import read_bandwidth
    from moeflow.kernels.cpu.library import instruction_set

    if device != "cpu":
        return read_bandwidth(device)
    return ceilings.read_bandwidth() if instruction_set() is not None else None


def card_lines(card: dict) -> dict[str, str]:
    """Return the lines of a card, by name."""
    named = {side: f"{card[side]['folder']} ({card[side]['commit'] or 'no commit'})" for side in ("before", "after")}
    read = card["read_bytes_per_s"]
    return {
        "model": f"{card['model']}, {card['dtype']}, {card['device']}",
        **named,
        "run": f"{card['tokens']} tokens of greedy decode, {card['rounds']} rounds in turn",
        "machine": f"{card['cpu']}, {card['cores']} cores, load {card['load']:.1f}",
        "ceiling": "not measured: no compiled kernels" if read is None else f"{read / 1e9:.1f} GB/s read from memory",
        "software": software(card),
    }


def commit_of(folder: Path) -> str | None:
    """Return the short commit of a folder that is a git checkout's root, with a + where files differ from it."""
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    run = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return f"{run.stdout.strip()}{'+' if changed else ''}" if run.returncode == 0 else None


def measure(workers: dict[str, "Worker"], budget: str, arguments: argparse.Namespace, card: dict) -> dict:
    """Load the model on both sides, decode in turns, print the row."""
    options = {"expert_memory": budget, "dtype": arguments.dtype, "device": arguments.device}
    loaded = {side: worker.ask(load={"model": arguments.model, **options}) for side, worker in workers.items()}
    speeds, same_tokens = in_turns(workers, arguments.rounds, decode=arguments.tokens)
    token_bytes = loaded["after"]["dense_bytes"] + card["expert_bytes_a_token"]
    read = card["read_bytes_per_s"]
    row = {
        "expert_memory": budget,
        **{side: spread(found) for side, found in speeds.items()},
        "speeds": speeds,
        "ratio": quotients(speeds["before"], speeds["after"]),
        "token_bytes": token_bytes,
        "ceiling_tokens_per_s": None if read is None else read / token_bytes,
        "same_tokens": same_tokens,
        "prompts": {},
    }
    print(f"expert memory {budget}")
    for side in workers:
        print(f"  {side:7} {ranged(row[side], 1, 7, 2)} tok/s")
    print(f"  ratio   {ranged(row['ratio'], 1, 7, 3)} before / after, in {arguments.rounds} rounds")
    if read is not None:
        print(f"  ceiling {row['ceiling_tokens_per_s']:7.2f} tok/s: {token_bytes / 1e6:.0f} MB a token, nothing missed")
    for length in arguments.prompts:
        speeds, same_tokens = in_turns(workers, arguments.rounds, first_token=length)
        row["prompts"][length] = {"speeds": speeds, "ratio": quotients(speeds["before"], speeds["after"])}
        row["same_tokens"] &= same_tokens
        print(f"  prompt of {length} tokens")
        for side in workers:
            seconds = spread([1 / speed for speed in speeds[side]])
            print(f"    {side:7} {ranged(seconds, 1e3, 7, 1)} ms to the first token")
        print(f"    ratio   {ranged(row['prompts'][length]['ratio'], 1, 7, 3)} before / after")
    print("  same tokens" if row["same_tokens"] else "  TOKENS DIFFER", flush=True)
    return row


def in_turns(workers: dict[str, "Worker"], rounds: int, **question: int) -> tuple[dict[str, list[float]], bool]:
    """Ask both sides in turns; return the speeds of each, and whether all answers have the same tokens."""
    answers = {tuple(worker.ask(**question)["tokens"]) for worker in workers.values()}  # warm-up
    speeds: dict[str, list[float]] = {side: [] for side in workers}
    sides = list(workers)
    for _ in range(rounds):
        for side in sides:
            found = workers[side].ask(**question)
            answers.add(tuple(found["tokens"]))
            speeds[side].append(found["speed"])
        sides.reverse()
    return speeds, len(answers) == 1


class WorkerEnded(Exception):
    """A worker that ended before it answered."""


class Worker:
    """A process that decodes with one checkout's moeflow: a JSON line in, a JSON line out.

    Args:
        name: in messages.
        folder: the checkout.
        threads: torch's; its own choice when None.
    """

    def __init__(self, name: str, folder: Path, threads: int | None):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )
        imported = Path(self.ask(start={"threads": threads})["moeflow"])
        if folder not in imported.parents:
            self.close()
            raise WorkerEnded(f"{name}: {imported} was imported, and not the moeflow of {folder}")

    def ask(self, **question: object) -> dict:
        """Return the answer to a question.

        Raises:
            WorkerEnded: the process ended; it has told why on standard error.
        """
        assert self._process.stdin is not None, "opened as a pipe"
        assert self._process.stdout is not None, "opened as a pipe"
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise WorkerEnded(f"{self.name}: the worker ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def work() -> None:
    """Answer questions until standard input ends. Knows `from moeflow import load_moe` and nothing else of moeflow."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries are no answers
    model = ids = None
    for line in sys.stdin:
        ((kind, value),) = json.loads(line).items()
        if kind == "start":
            answer = start(**value)
        elif kind == "load":
            if model is not None:
                model.moeflow.close()
            model = None  # frees its memory before the next
            model, ids = load(**value)
            answer = {"dense_bytes": dense_bytes(model)}
        else:
            answer = {"decode": decode, "first_token": first_token}[kind](model, ids, value)
        print(json.dumps(answer), file=answers, flush=True)
    if model is not None:
        model.moeflow.close()


def start(threads: int | None) -> dict:
    """Import moeflow; return the file it came from."""
    import torch
    from transformers.utils import logging

    import moeflow

    if threads is not None:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return {"moeflow": moeflow.__file__}


def load(model: str, expert_memory: str, dtype: str, device: str) -> tuple:
    """Return the model, without an end of text, and the prompt's token ids [1, T]."""
    from transformers import AutoTokenizer

    from moeflow import load_moe

    loaded = load_moe(model, expert_memory=expert_memory, dtype=dtype, device=device)
    loaded.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return loaded, tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(loaded.device)


def dense_bytes(model) -> int:
    """Return the bytes that a token reads beside its experts: all weights, of an embedding table only a tied one."""
    weights = {id(weight): weight.numel() * weight.element_size() for weight in model.parameters()}
    output = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    if output is None or output.weight is not table:
        weights.pop(id(table), None)
    return sum(weights.values())


def decode(model, ids, num_tokens: int) -> dict:
    """Decode greedily; return the tokens, and tokens a second from the first to the last."""
    streamer = TokenTimes()
    produced = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, streamer=streamer)
    tokens = produced[0, ids.shape[1] :].tolist()
    assert len(streamer.times) == len(tokens) + 1 == num_tokens + 1, "one time for the prompt, one for each token"
    return {"tokens": tokens, "speed": (num_tokens - 1) / (streamer.times[-1] - streamer.times[1])}


def first_token(model, ids, length: int) -> dict:
    """Compute the token behind a prompt, random but for its beginning; return it, and prompts a second."""
    import torch

    drawn = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    drawn = drawn.to(ids.device)
    drawn[:, : ids.shape[1]] = ids[:, :length]
    begin = time.perf_counter()
    produced = model.generate(drawn, max_new_tokens=1, do_sample=False)
    return {"tokens": produced[0, length:].tolist(), "speed": 1 / (time.perf_counter() - begin)}


if __name__ == "__main__":
    sys.exit(main())
