"""Recorded arrivals replayed: the share of requests within limits, of servers that schedule in different ways.

Knows the trace of requests and what is measured and printed.
"""

import argparse
import csv
import random
import statistics
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from bench.server.clients import TEXT, Answer, ask, ask_all
from bench.server.process import ServerProcess, llama_server, moeflow_server

SCALE = 0.25  # of the recorded lengths
PROMPT_LIMITS, ANSWER_LIMITS = (16, 512), (4, 64)
PROBES, PROBE_ANSWER = (32, 384), 16  # tokens of the prompts that the unloaded server is asked, and of its answers
SAMPLES = 3
UNCHUNKED = 1_000_000  # tokens of a pass: every prompt is computed whole as it comes


class Arrival(NamedTuple):
    """A recorded request, scaled to the machine.

    Args:
        at_s: recorded seconds since the first.
        prompt_tokens: of its prompt.
        answer_tokens: of its answer.
    """

    at_s: float
    prompt_tokens: int
    answer_tokens: int


class Limits(NamedTuple):
    """What an answer must keep to.

    Args:
        slack: how many times as long as on the unloaded server it may take.
        base_s, token_s: TTFT of an unloaded server: base_s, and token_s for each token of the prompt.
        tpot_s: of an unloaded server.
    """

    slack: float
    base_s: float
    token_s: float
    tpot_s: float

    def hold(self, arrival: Arrival, answer: Answer) -> bool:
        """Whether an answer came in time."""
        most_s = self.slack * (self.base_s + self.token_s * arrival.prompt_tokens)
        return answer.ttft_s <= most_s and answer.tpot_s <= self.slack * self.tpot_s


def read_arrivals(lines: Iterable[str], count: int) -> list[Arrival]:
    """Return the first requests of a trace in the form of Azure's, with scaled lengths."""
    arrivals: list[Arrival] = []
    for row in csv.DictReader(lines):
        if len(arrivals) == count:
            break
        at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        lengths = (
            min(max(round(SCALE * int(row[name])), least), most)
            for name, (least, most) in (("ContextTokens", PROMPT_LIMITS), ("GeneratedTokens", ANSWER_LIMITS))
        )
        arrivals.append(Arrival(at_s, *lengths))
    return [one._replace(at_s=one.at_s - arrivals[0].at_s) for one in arrivals]


def stretched(arrivals: list[Arrival], span_s: float) -> list[float]:
    """Return when each request comes if all of them come in so many seconds."""
    recorded_s = arrivals[-1].at_s or 1.0
    return [one.at_s * span_s / recorded_s for one in arrivals]


def measure(arguments: argparse.Namespace) -> dict:
    """Return the goodput of each server at the same arrivals, and what it was derived from."""
    if not arguments.requests.is_file():
        return {"skipped": f"{arguments.requests} is not there: give --requests"}
    with open(arguments.requests) as file:
        arrivals = read_arrivals(file, arguments.arrivals)
    texts = Texts(arguments.model)
    with moeflow_server(arguments.model, arguments.memory, arguments.threads) as server:
        limits = unloaded(server, texts, arguments.slack)
        answers = ask_all(server.url, TEXT, [texts.body(one.prompt_tokens, one.answer_tokens) for one in arrivals])
    busy_s = max(one.last_s for one in answers) - answers[0].due_s
    at_s = stretched(arrivals, busy_s / arguments.load)
    bodies = [texts.body(one.prompt_tokens, one.answer_tokens) for one in arrivals]
    found: dict = {
        "requests": len(arrivals),
        "prompt_tokens": sum(one.prompt_tokens for one in arrivals),
        "answer_tokens": sum(one.answer_tokens for one in arrivals),
        "requests_per_s": len(arrivals) / busy_s,
        "load": arguments.load,
        "limits": limits._asdict(),
        "servers": {},
        "skipped_servers": {},
    }
    for name, server_of in sides(arguments, found["skipped_servers"]).items():
        with server_of as server:
            ask(server.url, TEXT, texts.body(PROBES[0], PROBE_ANSWER))  # warms up
            answers = ask_all(server.url, TEXT, bodies, at_s)
        found["servers"][name] = figures(arrivals, answers, limits)
    return found


def sides(arguments: argparse.Namespace, skipped: dict[str, str]) -> dict[str, ServerProcess]:
    """Return the servers that are compared; those that are not here go into `skipped` with the reason."""
    common = arguments.model, arguments.memory, arguments.threads
    found = {
        "moeflow": moeflow_server(*common),
        "first come, without chunks": moeflow_server(*common, "--max-step-tokens", str(UNCHUNKED)),
    }
    name = "llama.cpp, all resident"
    if arguments.llama_python is None:
        skipped[name] = "give --llama-python, a Python that has llama-cpp-python[server]"
    else:
        from bench.gguf_file import gguf_of
        from moeflow.errors import MoeflowError

        try:
            gguf = gguf_of(arguments.model, arguments.work)
        except MoeflowError as error:
            skipped[name] = str(error)
        else:
            found[name] = llama_server(arguments.llama_python, gguf, arguments.threads, 1024)
    return found


def unloaded(server: ServerProcess, texts: "Texts", slack: float) -> Limits:
    """Return the limits that the speed of a server without load sets."""
    times = []
    for size in PROBES:
        bodies = [texts.body(size, PROBE_ANSWER) for _ in range(SAMPLES + 1)]
        answers = [ask(server.url, TEXT, body) for body in bodies][1:]  # the first one warms up
        times.append([statistics.median(getattr(one, name) for one in answers) for name in ("ttft_s", "tpot_s")])
    (short_s, tpot_s), (long_s, _) = times
    token_s = max(0.0, (long_s - short_s) / (PROBES[1] - PROBES[0]))
    return Limits(slack, max(0.0, short_s - PROBES[0] * token_s), token_s, tpot_s)


def figures(arrivals: list[Arrival], answers: list[Answer], limits: Limits) -> dict:
    """Return the goodput of a server and the times of its answers."""
    held = [limits.hold(arrival, answer) for arrival, answer in zip(arrivals, answers, strict=True)]
    ttft_s, tpot_s = sorted(one.ttft_s for one in answers), sorted(one.tpot_s for one in answers)
    return {
        "goodput": sum(held) / len(held),
        "ttft_median_s": statistics.median(ttft_s),
        "ttft_p90_s": ttft_s[int(0.9 * (len(ttft_s) - 1))],
        "tpot_median_s": statistics.median(tpot_s),
        "tpot_p90_s": tpot_s[int(0.9 * (len(tpot_s) - 1))],
    }


class Texts:
    """Prompts of the standard library's text, each from another place.

    Args:
        model: whose tokenizer says how long they are.
    """

    def __init__(self, model: Path) -> None:
        from moeflow.calibration.sample_texts import library_texts
        from moeflow.hf.pretrained import load_tokenizer

        self._tokenizer = load_tokenizer(model)
        self._ids = [token for piece in library_texts(self._tokenizer, 1 << 16) for token in piece]
        self._random = random.Random(0)
        end = self._tokenizer.eos_token_id
        self._banned = {} if end is None else {"logit_bias": {str(end): -100}}  # both servers know it

    def body(self, prompt_tokens: int, answer_tokens: int) -> dict:
        """Return the body of a request, whose answer has so many tokens."""
        begin = self._random.randrange(len(self._ids) - prompt_tokens)
        prompt = self._tokenizer.decode(self._ids[begin : begin + prompt_tokens])
        return {"prompt": prompt, "max_tokens": answer_tokens, "temperature": 0, **self._banned}


def lines(found: dict) -> list[str]:
    """Return what is printed."""
    if "skipped" in found:
        return [f"skipped: {found['skipped']}"]
    limits = found["limits"]
    told = [
        f"{found['requests']} requests of {found['prompt_tokens']} + {found['answer_tokens']} tokens in all, at "
        f"{found['load']:.0%} of the {found['requests_per_s']:.2f} a second that come through where all wait",
        f"limits: {limits['slack']:g} times the unloaded TTFT ({limits['base_s']:.2f} s + "
        f"{1000 * limits['token_s']:.2f} ms a token of the prompt) and TPOT ({1000 * limits['tpot_s']:.0f} ms)",
        f"{'server':28} {'goodput':>8} {'TTFT s median':>14} {'p90':>7} {'TPOT ms median':>15} {'p90':>7}",
    ]
    for name, row in found["servers"].items():
        told.append(
            f"{name:28} {row['goodput']:8.2f} {row['ttft_median_s']:14.2f} {row['ttft_p90_s']:7.2f} "
            f"{1000 * row['tpot_median_s']:15.0f} {1000 * row['tpot_p90_s']:7.0f}"
        )
    return told + [f"{name}: skipped, {why}" for name, why in found["skipped_servers"].items()]
