"""Decoding from packed files in both formats under a memory limit, each run a process of its own: the part "capped".

    python lossless_capped.py JOB

is such a process. Knows what a user of the defaults gets: expert_memory="auto", the predictor of the defaults.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.cgroup import CgroupUnavailable, drop_page_cache, run_process
from bench.lossless_decode import (
    SIDES,
    WrongBits,
    first_answer,
    greedy,
    mean_between,
    packed_models,
    print_quiet,
    prompt_ids,
    say,
)
from bench.rounds import quotients, ranged, spread
from bench.token_times import TokenTimes
from moeflow.machine.others_load import OthersLoad

GENERATIONS = 5  # measured in a process, behind one that fills the slots
TIMEOUT_S = 600


def measure_capped(folder: Path, work: Path, arguments) -> dict:
    """Decode in both formats in turns, each in a fresh memory cgroup; print times, slots, hit rates and bytes.

    Returns:
        Rows by format; or "missing" or "error" and why.
    """
    from moeflow.memory_size import parse_memory

    limit = parse_memory(arguments.cap, name="--cap", whole_bytes=0)
    packed = packed_models(folder, work)
    threads = max(int(number) for number in arguments.threads.split(","))
    runs: dict[str, list[dict]] = {name: [] for name in SIDES}
    for turn in range(arguments.rounds):
        say(f"round {turn + 1} of {arguments.rounds}")
        for name in SIDES[::-1] if turn % 2 else SIDES:  # what ran before counts on some disks
            drop_page_cache([file for path in packed.values() for file in path.iterdir() if file.is_file()])
            job = {"model": str(packed[name]), "tokens": arguments.tokens, "threads": threads}
            command = [sys.executable, str(Path(__file__).resolve()), json.dumps(job)]
            try:
                ended = run_process(command, limit_bytes=limit, timeout_s=TIMEOUT_S)
            except CgroupUnavailable as error:
                print(f"Decoding under {arguments.cap}: left out, no memory cgroup can be made here ({error})")
                return {"missing": str(error)}
            if ended.returncode:
                why = "killed at the cap" if ended.oom_killed else (ended.stderr.strip().splitlines() or ["failed"])[-1]
                print(f"Decoding under {arguments.cap}: {name}: {why}")
                return {"error": f"{name}: {why}"}
            runs[name].append(json.loads(ended.stdout.splitlines()[-1]) | {"cgroup_peak_bytes": ended.peak_bytes})
    if len({run["digest"] for found in runs.values() for run in found}) > 1:
        raise WrongBits(f"tokens or logits under {arguments.cap}")
    print(
        f"Decoding: whole processes under {arguments.cap}, packed files, expert_memory auto; {threads} threads; "
        "same tokens and logits"
    )
    heads = f"{'ms a token':>26} {'x bfloat16':>22} {'slots':>20} {'hit rate':>22} {'MB read a token':>24}"
    print(f"{'experts':9} {heads} {'ms stalled':>10} {'cgroup MB':>9} {'others %':>8}")
    times = {name: [run["token_s"] for run in found] for name, found in runs.items()}
    rows = {}
    for name, found in runs.items():
        row = {"token_s": spread(times[name]), "ratio_to_bfloat16": quotients(times["bfloat16"], times[name])}
        row |= {key: spread([run[key] for run in found]) for key in found[0] if key not in ("digest", "token_s")}
        row["rounds"] = {key: [run[key] for run in found] for key in ("token_s", "others_share")}
        rows[name] = row
        print(
            f"{name:9} {ranged(row['token_s'], 1e3, 8, 2):>26} {ranged(row['ratio_to_bfloat16'], 1, 6, 2):>22} "
            f"{ranged(row['slots'], 1, 4, 0):>20} {ranged(row['hit_rate'], 1, 6, 3):>22} "
            f"{ranged(row['bytes_a_token'], 1e-6, 6, 1):>24} {1e3 * row['stall_s']['median']:10.2f} "
            f"{row['cgroup_peak_bytes']['median'] / 1e6:9.0f} {100 * row['others_share']['median']:8.0f}"
        )
    print_quiet(rows, {"ms a token": "token_s"})
    return rows


def work(job: dict) -> dict:
    """Load, fill the slots with a first generation, decode; return seconds, hits, bytes and a digest of all bits."""
    import torch

    from moeflow import load_moe

    torch.set_num_threads(job["threads"])
    ids = prompt_ids(Path(job["model"]))
    with torch.inference_mode():
        model = load_moe(job["model"], device="cpu", expert_memory="auto")
        fixed = greedy(ids, job["tokens"])
        tokens, digest = first_answer(model, ids, fixed)
        model.moeflow.reset_stats()
        times, others = [], OthersLoad()
        for _ in range(GENERATIONS):
            clock = TokenTimes()
            again = model.generate(ids, **fixed, streamer=clock)
            if not torch.equal(again, tokens):
                digest = "another answer to the same prompt"
            times.append(mean_between(clock))
        others_share, stats = others.share(), model.moeflow.stats()
    decode = stats["decode"]
    return {
        "digest": digest,
        "token_s": statistics.median(times),
        "others_share": others_share or 0,
        "slots": stats["slots"],
        "hit_rate": decode["hit_rate"],
        "bytes_a_token": decode["bytes_from_disk"] / decode["tokens"],
        **{f"{what}_s": decode[f"{what}_s"] / decode["tokens"] for what in ("stall", "compute", "predict")},
    }


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
