"""What verifying takes under a memory cap, and what comparing slots with their source costs while a model decodes.

    python scripts/bench_verify.py [--model FOLDER] [--cap-mb 700] [--tokens 256] [--rounds 8]

`moeflow verify` runs in a process of its own in a memory cgroup. Then one process holds the model twice, with
integrity="off" and "sample"; both answer in turns, and the ratio of their seconds is told round by round. Each starts a
round with experts on disk as the round before left them: the demands are the same. Where no cgroup can be made, the
first part is left out and said so.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.cgroup import CgroupUnavailable, run_process
from bench.machine import describe, software
from bench.rounds import Case, quotients, ranged, take_turns

PROMPT = "The history of the steam engine begins long before the railways."


def main(argv: list[str] | None = None) -> int:
    """Measure both; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; without it the demo model")
    parser.add_argument("--cap-mb", type=int, default=700, help="of the process that verifies (700)")
    parser.add_argument("--tokens", type=int, default=256, help="that are verified (256)")
    parser.add_argument("--budget", default="25%", help="of experts while decoding (25%%)")
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer (48)")
    parser.add_argument("--rounds", type=int, default=8, help="answers of each (8)")
    arguments = parser.parse_args(argv)

    from transformers.utils import logging

    from moeflow.demo.model import default_demo_path

    logging.disable_progress_bar()
    folder = Path(arguments.model) if arguments.model else default_demo_path()
    card = describe("torch", "transformers")
    print(f"{folder.name}; {card['cpu']}, {card['cores']} cores, load {card['load']:.1f}, {software(card)}")
    verified = _verify(folder, arguments.cap_mb, arguments.tokens)
    overhead = _overhead(folder, arguments)
    print(json.dumps({"verify": verified, "integrity": overhead}))
    return 0 if verified.get("equal", True) else 1


def _verify(folder: Path, cap_mb: int, num_tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "moeflow", "verify", str(folder), "--tokens", str(num_tokens), "--json"]
    begin = time.perf_counter()
    try:
        finished = run_process(command, limit_bytes=cap_mb * 10**6, timeout_s=3600)
    except CgroupUnavailable as error:
        print(f"verify: not measured, {error}")
        return {"unavailable": str(error)}
    seconds = time.perf_counter() - begin
    if finished.returncode not in (0, 1) or not finished.stdout:
        raise SystemExit(f"moeflow verify failed ({finished.returncode}):\n{finished.stderr[-2000:]}")
    found = json.loads(finished.stdout)
    worst = max(layer["difference"] for layer in found["layers"])
    print(
        f"verify under {cap_mb} MB: {'equal' if found['equal'] else 'differs'}, {found['num_tokens']} tokens, "
        f"{len(found['layers'])} layers, bound {found['bound']:.2g}, largest difference {worst:.2g}, {seconds:.1f} s"
    )
    return {
        "equal": found["equal"],
        "cap_bytes": cap_mb * 10**6,
        "peak_bytes": finished.peak_bytes,
        "tokens": found["num_tokens"],
        "layers": len(found["layers"]),
        "bound": found["bound"],
        "largest_difference": worst,
        "seconds": seconds,
    }


def _overhead(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from moeflow import load_moe

    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    models = {mode: load_moe(folder, expert_memory=arguments.budget, integrity=mode) for mode in ("off", "sample")}
    answers: dict[str, list[int]] = {}

    def answer(mode: str) -> None:
        out = models[mode].generate(
            **prompt, max_new_tokens=arguments.new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        answers[mode] = out[0].tolist()

    cases = [Case(mode, lambda mode=mode: answer(mode), 0) for mode in models]
    times = take_turns(cases, arguments.rounds)
    assert answers["off"] == answers["sample"], "the answers differ"
    ratio = quotients(times["sample"], times["off"])
    found = models["sample"].moeflow.stats()["integrity"]
    for model in models.values():
        model.moeflow.close()
    share = found["seconds"] / (sum(times["sample"]) + sum(times["off"]))
    print(
        f'integrity="sample" against "off", {arguments.budget} of experts, {arguments.new_tokens} tokens an answer: '
        f"{ranged(ratio, 1, 5, 3)} of the time; {found['checked']} slots compared, {found['differing']} differ, "
        f"{share:.2%} of a core"
    )
    return {"ratio": ratio, "seconds_by_round": times, "share_of_a_core": share, **found}


if __name__ == "__main__":
    raise SystemExit(main())
