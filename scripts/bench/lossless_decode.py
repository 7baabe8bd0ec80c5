"""Decoding with the experts of a model in both formats, in turns, in one process: the parts "resident" and "budget"."""

import hashlib
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from bench.best_hit_rate import best_hit_rate
from bench.rounds import QUIET_SHARE, quiet_ratio, quotients, ranged, spread
from bench.step_worker import StepClock
from bench.token_times import TokenTimes
from moeflow.machine.others_load import OthersLoad

PROMPT = "The history of the steam engine begins long before the railways. In the first century,"
SIDES = ("bfloat16", "lossless")
FIRST_STEPS = 2  # of a generation, that are not counted


class WrongBits(Exception):
    """A value that did not come back."""


def say(text: str) -> None:
    """Tell progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def packed_models(folder: Path, work: Path) -> dict[str, Path]:
    """Return the model packed in both formats, written at the first call."""
    from moeflow.convert.pack import pack_model

    packed = {name: work / name for name in SIDES}
    for name, path in packed.items():
        if not path.exists():
            say(f"packing, {name}")
            pack_model(folder, path, lossless=name == "lossless")
    return packed


def greedy(ids, num_tokens: int) -> dict:
    """Return the arguments of generate() for so many tokens, whatever they are."""
    import torch

    fixed = {"min_new_tokens": num_tokens, "max_new_tokens": num_tokens, "do_sample": False}
    return fixed | {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}


def prompt_ids(folder: Path):
    """Return the prompt's tokens, [1, T]."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]


def first_answer(model, ids, fixed: dict):
    """Return the tokens of a first generation, and a digest of all bits of tokens and logits."""
    import torch

    out = model.generate(ids, **fixed, output_logits=True, return_dict_in_generate=True)
    digest = hashlib.sha256(out.sequences.numpy().tobytes())
    for logits in out.logits:
        digest.update(logits.contiguous().view(torch.uint8).numpy().tobytes())
    return out.sequences, digest.hexdigest()


def mean_between(clock: TokenTimes) -> float:
    """Return the mean seconds of a generation's steps, behind the first."""
    return statistics.mean(after - before for before, after in pairwise(clock.times[1 + FIRST_STEPS :]))


def measure_resident(folder: Path, arguments) -> dict:
    """Decode with all experts in memory, in both formats."""
    from moeflow import load_moe

    options = {"device": "cpu", "predictor": None, "expert_memory": "100%"}
    models = {
        "bfloat16": load_moe(folder, **options),
        "lossless": load_moe(folder, **options, quantization="lossless"),
    }
    return compare(models, folder, arguments, "all experts in memory, dense parts in the lossless format too")


def measure_budget(folder: Path, work: Path, arguments) -> dict:
    """Decode with the same bytes for experts from two packed files, in both formats; print Belady's hit rates."""
    from moeflow import load_moe

    packed = packed_models(folder, work)
    options = {"device": "cpu", "predictor": None}
    bf16 = load_moe(packed["bfloat16"], **options, expert_memory="100%")
    budget = int(arguments.budget * bf16.moeflow.stats()["memory"]["all_experts_bytes"])
    bf16.moeflow.close()
    models = {name: load_moe(path, **options, expert_memory=budget) for name, path in packed.items()}
    what = f"{budget >> 20} MiB for experts, {arguments.budget:.0%} of theirs in bfloat16; packed files, no predictor"
    return compare(models, folder, arguments, what, with_best=True)


def compare(models: dict, folder: Path, arguments, what: str, *, with_best: bool = False) -> dict:
    """Decode with both models in turns; print times, hit rates and bytes; close the models."""
    import torch

    ids = prompt_ids(folder)
    fixed = greedy(ids, arguments.tokens)
    answers, clocks = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch) / "trace.safetensors"
        for name, model in models.items():
            recorder = _record(model, trace) if with_best and name == "bfloat16" else None
            answers[name] = first_answer(model, ids, fixed)
            if recorder is not None:
                recorder.close()
                model.moeflow.observers.remove(recorder)
            native = model.moeflow.stats()["step"]["mode"] == "native"
            clocks[name] = StepClock(model.moeflow) if native else None
            model.moeflow.reset_stats()
        if len({digest for _, digest in answers.values()}) > 1:
            raise WrongBits(f"tokens or logits, {what}")
        token_s: dict[str, list[float]] = {name: [] for name in models}
        step_s: dict[str, list[float]] = {name: [] for name in models}
        others: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(arguments.rounds):
            say(f"round {turn + 1} of {arguments.rounds}")
            for name, model in models.items():
                clock, load = TokenTimes(), OthersLoad()
                if (steps := clocks[name]) is not None:
                    steps.clear()
                again = model.generate(ids, **fixed, streamer=clock)
                if not torch.equal(again, answers[name][0]):
                    raise WrongBits(f"tokens of {name}, {what}")
                others[name].append(load.share() or 0)
                token_s[name].append(mean_between(clock))
                if steps is not None:
                    step_s[name].append(statistics.median(steps.walls[FIRST_STEPS:]))
        rows = {}
        for name, model in models.items():
            stats = model.moeflow.stats()
            decode = stats["decode"]
            both = bool(step_s[name] and step_s["bfloat16"])
            rows[name] = {
                "token_s": spread(token_s[name]),
                "ratio_to_bfloat16": quotients(token_s["bfloat16"], token_s[name]),
                "step_s": spread(step_s[name]) if step_s[name] else None,
                "step_ratio_to_bfloat16": quotients(step_s["bfloat16"], step_s[name]) if both else None,
                "all_experts_bytes": stats["memory"]["all_experts_bytes"],
                "slots": stats["slots"],
                "hit_rate": decode["hit_rate"],
                "bytes_a_token": decode["bytes_from_disk"] / decode["tokens"],
                "step": stats["step"]["mode"],
                "others_share": spread(others[name]),
                "rounds": {"token_s": token_s[name], "step_s": step_s[name], "others_share": others[name]},
            }
            model.moeflow.close()
        if with_best:
            for row in rows.values():
                row["best_hit_rate"] = best_hit_rate(trace, row["slots"], arguments.rounds)
    _print(rows, f"Decoding: {what}; {torch.get_num_threads()} threads; same tokens and logits")
    return rows


def _record(model, trace: Path):
    from moeflow.trace.recorder import attach_recorder

    return attach_recorder(model, trace)


def _print(rows: dict, title: str) -> None:
    """Print the table, and Belady's hit rates where they are known."""
    print(title)
    heads = f"{'ms a token':>24} {'x bfloat16':>22} {'ms a native step':>24} {'x bfloat16':>22}"
    heads += f" {'experts MB':>10} {'slots':>5} {'hit rate':>8} {'MB read a token':>15} {'others %':>8}"
    print(f"{'experts':9} {heads}")
    for name, row in rows.items():
        print(
            f"{name:9} {ranged(row['token_s'], 1e3, 8, 2):>24} {ranged(row['ratio_to_bfloat16'], 1, 6, 2):>22} "
            f"{ranged(row['step_s'], 1e3, 8, 2):>24} {ranged(row['step_ratio_to_bfloat16'], 1, 6, 2):>22} "
            f"{row['all_experts_bytes'] / 1e6:10.0f} {row['slots']:5} {row['hit_rate']:8.3f} "
            f"{row['bytes_a_token'] / 1e6:15.2f} {100 * row['others_share']['median']:8.0f}"
        )
    print_quiet(rows, {"ms a token": "token_s", "ms a native step": "step_s"})
    best = [(row["slots"], row["best_hit_rate"], row["hit_rate"]) for row in rows.values() if "best_hit_rate" in row]
    if best:
        told = "; ".join(f"{slots} slots {rate:.3f} (reached {hits:.3f})" for slots, rate, hits in best)
        print(f"best hit rate that these routes allow (Belady): {told}")


def print_quiet(rows: dict, quantities: dict[str, str]) -> None:
    """Print ratios of the rounds in which others took little, and add them to the rows of lossless experts."""
    bf16, lossless = (rows[name]["rounds"] for name in SIDES)
    others, told = list(map(max, bf16["others_share"], lossless["others_share"])), []
    for what, key in quantities.items():
        if not (bf16[key] and lossless[key]):
            continue
        found = rows["lossless"][f"quiet_{key}_ratio_to_bfloat16"] = quiet_ratio(bf16[key], lossless[key], others)
        if found:
            told.append(f"{what} {ranged(found, 1, 4, 2)}")
    count = sum(share <= QUIET_SHARE for share in others)
    print(
        f"others took at most {QUIET_SHARE:.0%} of the processors in {count} of {len(others)} rounds"
        + (f"; x bfloat16 in these: {', '.join(told)}" if told else "")
    )
