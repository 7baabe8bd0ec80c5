"""Planned against measured: the peak memory, prefill and decode speed of `moeflow fit`'s rows, each in its own process.

    python scripts/bench_fit.py DEMO --work FOLDER [--rows 16] [--tokens 64]

Rows are of the demo model and of the same with every expert cut in two (32 experts a layer, top-4), in bfloat16,
lossless, int8 and int4, at 12.5, 25, 50 and 100 % of the experts, in a memory cgroup of 1000 MB and without one. The
folders are written below --work once, and each is run once before anything is measured, so that its decode step lies on
the disk as a program. Hit rates are those that `moeflow fit` takes: of the demo model its measured curve, which other
texts gave; of the cut one, which is like no model that was measured, a trace of answers to other prompts. Then the plan
of every row is made and a process loads the model by it. It answers twice: prefill is that of the first prompt, for
which nothing is resident, decoding that of the second answer, when the cache is warm. A 671B model's headers, 163
sparse shards, are planned last. The last line printed is one JSON object.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for helpers.large_checkpoint, which no install brings

FORMATS = ("bf16", "lossless", "int8", "int4")
SHARES = (0.125, 0.25, 0.5, 1.0)
PROMPT_TOKENS, CONTEXT = 256, 512
LIMITS = {"peak": (-0.03, 0.10), "decode": (-0.25, 0.25), "prefill": (-0.35, 0.35)}  # planned / measured - 1
_SKIPPED_TOKENS = 4  # of decoding: what the prompt left is not what an answer wants
_OTHER_PROMPTS = (
    "List five reasons why people keep bees, and explain each in a sentence.",
    "def quicksort(items):",
    "Once upon a time a lighthouse keeper found a letter in a bottle. It said:",
)
_TEXT = (
    "A river begins as rain on high ground. It gathers in hollows, finds the lowest way through stone and soil, and on "
    "its way it is given names by the people who live beside it. Towns grow where it can be crossed, mills where it "
    "falls, and harbours where it meets the sea. Explain how the course of a river changes over thousands of years. "
)
_CHILD = """
import json, sys, time
import torch
import moeflow
from moeflow.hardware import process_memory_bytes
from moeflow.hf.pretrained import load_tokenizer

folder, plan, num_prompt, num_new, text = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
tokens = (load_tokenizer(folder)(text * 8)["input_ids"] * num_prompt)
options = {"expert_memory": "25%", "device": "cpu"} if plan == "-" else {"plan": plan}
times = []

class Clock:
    def put(self, value): times.append(time.perf_counter())
    def end(self): pass

model = moeflow.load_moe(folder, **options)
with model.moeflow:
    def answer(begin):
        times.clear()
        ids = torch.tensor([tokens[begin : begin + num_prompt]])
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new,
                       do_sample=False, streamer=Clock())
    answer(0)
    prefill = num_prompt / (times[1] - times[0])
    model.moeflow.reset_stats()
    answer(num_prompt // 2)
    stats = model.moeflow.stats()
    skipped = min(1 + SKIPPED, len(times) - 2)
    print(json.dumps({
        "peak_bytes": process_memory_bytes()[1],
        "prefill_tok_s": prefill,
        "decode_tok_s": (len(times) - 1 - skipped) / (times[-1] - times[skipped]),
        "hit_rate": stats["decode"]["hit_rate"],
        "step": stats["step"]["mode"],
        "prediction": stats["prediction"]["reason"],
        "plan": stats["plan"],
    }))
""".replace("SKIPPED", str(_SKIPPED_TOKENS))
_TRACE = """
import sys
import moeflow
from moeflow.hf.pretrained import load_tokenizer

folder, file, *prompts = sys.argv[1:]
model, tokenizer = moeflow.load_moe(folder, device="cpu", predictor=None, trace=file), load_tokenizer(folder)
with model.moeflow:
    for prompt in prompts:
        model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=96, min_new_tokens=96, do_sample=True)
print("{}")
"""
_FIT = """
import sys, time
begin = time.perf_counter()
from moeflow.fit.fit import survey
from moeflow.machine.profile import MachineProfile
import json
found = survey(sys.argv[1], profile=MachineProfile.from_dict(json.loads(sys.argv[2])), memory="2TB")
assert found.recommended is not None
from moeflow.hardware import process_memory_bytes
print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": process_memory_bytes()[1]}))
"""


def folders(demo: Path, work: Path) -> dict[tuple[str, str], Path]:
    """Write the models that are measured, unless they lie there: (model, format) -> folder."""
    from bench.fine_grained import cut_experts
    from moeflow.convert.pack import pack_model
    from moeflow.convert.quantize import quantize_model
    from moeflow.kernels.quantization.formats import find_format

    found = {("demo", "bf16"): demo, ("fine", "bf16"): cut_experts(demo, work / "fine-bf16")}
    for model, form in itertools.product(("demo", "fine"), FORMATS[1:]):
        folder = found[model, form] = work / f"{model}-{form}"
        if folder.is_dir():
            continue
        print(f"writing {folder}", file=sys.stderr)
        if form == "lossless":
            pack_model(found[model, "bf16"], folder, lossless=True)
        else:
            quantize_model(found[model, "bf16"], folder, find_format(f"{form}-g64").name, method="rtn")
    return found


def chosen_rows(count: int | None) -> list[tuple[str, str, float, int | None]]:
    """Return (model, format, share, cap) of the first `count` rows, in an order that mixes them; those that cannot fit
    under a cap are left out when they are planned.
    """
    rows = []
    for turn in range(len(SHARES)):
        for number, form in enumerate(FORMATS):
            share = SHARES[(turn + number) % len(SHARES)]
            for place, model in enumerate(("demo", "fine")):
                rows.append((model, form, share, 1_000_000_000 if (turn + number + place) % 2 else None))
    return rows[:count]


def run(command: list[str], cap: int | None = None, timeout_s: float = 600) -> dict:
    """Run a child and return the JSON of its last line, with the cgroup's peak where it has a cap."""
    from bench.cgroup import run_process

    ended = run_process(command, limit_bytes=cap, timeout_s=timeout_s)
    if ended.returncode or not ended.stdout.strip():
        return {"error": "killed for memory" if ended.oom_killed else ended.stderr.strip()[-400:]}
    return json.loads(ended.stdout.strip().splitlines()[-1]) | {"cgroup_peak_bytes": ended.peak_bytes}


def curves(demo: Path, fine: Path, work: Path) -> dict:
    """Return the hit rates of both models: the demo model's measured ones, and those of a trace of the cut one."""
    from moeflow.fit.hit_curves import curve_for, curve_of_trace
    from moeflow.fit.sizes import sizes_of

    found = {}
    for model, folder in (("demo", demo), ("fine", fine)):
        sizes = sizes_of(folder)
        num_experts = max(layer.num_experts for layer in sizes.layers)
        if model == "demo":
            found[model] = curve_for(num_experts, sizes.top_k)
            continue
        file = work / "fine.trace"
        if not file.exists():
            traced = run([sys.executable, "-c", _TRACE, str(folder), str(file), *_OTHER_PROMPTS])
            assert "error" not in traced, traced["error"]
        found[model] = curve_of_trace(file, of=(len(sizes.layers), num_experts, sizes.top_k))
    return found


def measure(row, folder: Path, profile, curve, num_new: int, work: Path) -> dict:
    """Plan one row and run it."""
    from moeflow.fit.fit import Survey
    from moeflow.fit.rows import Wish, row_maker
    from moeflow.fit.sizes import sizes_of

    model, form, share, cap = row
    sizes = sizes_of(folder)
    wish = Wish(CONTEXT, 1, cap or 16_000_000_000)
    made = row_maker(sizes, sizes.published, wish, profile, curve)(
        int(share * sizes.experts_bytes(sizes.published)), f"{share:.1%}"
    )
    facts = {"model": model, "format": form, "share": share, "cap_bytes": cap, "planned": made.as_dict()}
    if not made.fits:
        return facts | {"skipped": f"does not fit, short by {made.short_bytes:,} bytes"}
    file = work / "row.plan"
    Survey(str(folder), sizes, wish, profile, curve, [made], made).plan().save(file)
    command = [sys.executable, "-c", _CHILD, str(folder), str(file), str(PROMPT_TOKENS), str(num_new), _TEXT]
    begin = time.perf_counter()
    facts["measured"] = measured = run(command, cap)
    facts["wall_s"] = time.perf_counter() - begin
    if "error" not in measured:
        facts["errors"] = {
            "peak": made.total_bytes / measured["peak_bytes"] - 1,
            "decode": made.decode_tok_s.mid / measured["decode_tok_s"] - 1,
            "prefill": made.prefill_tok_s.mid / measured["prefill_tok_s"] - 1,
        }
    return facts


def large(profile, repeats: int = 3) -> dict:
    """Plan a 671B model by the headers of 163 sparse shards, in processes of their own."""
    from helpers.large_checkpoint import LARGE_CONFIG, write_large_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        write_large_checkpoint(Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps(LARGE_CONFIG))
        command = [sys.executable, "-c", _FIT, folder, json.dumps(profile.to_dict())]
        runs = [run(command) for _ in range(repeats)]
    return {name: max(one[name] for one in runs) for name in ("seconds", "peak_bytes")}


def main(argv=None) -> int:
    """Print the table and one JSON object."""
    from bench.machine import describe
    from moeflow.machine.measure import measure_profile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the demo model's folder")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is written; it stays")
    parser.add_argument("--rows", type=int, help="only the first N rows (all)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to decode (64)")
    parser.add_argument("--seconds", type=float, default=20, help="of measuring the machine (20)")
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    found, rows = folders(arguments.model, arguments.work), chosen_rows(arguments.rows)
    for folder in dict.fromkeys(found[model, form] for model, form, *_ in rows):
        first = run([sys.executable, "-c", _CHILD, str(folder), "-", "64", "8", _TEXT])
        assert "error" not in first, first["error"]
    rates = curves(found["demo", "bf16"], found["fine", "bf16"], arguments.work)
    profile = measure_profile(arguments.work, seconds=arguments.seconds)
    card = describe("moeflow", "torch", "transformers") | {"machine": profile.hardware}
    print(f"{card['machine']}, load {card['load']:.1f}; planned / measured - 1 in brackets\n")
    print("| model | format | resident | cap | peak MB, planned / measured | decode tok/s | prefill tok/s | hit rate |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for row in rows:
        results.append(facts := measure(row, found[row[:2]], profile, rates[row[0]], arguments.tokens, arguments.work))
        print(_line(facts), flush=True)
    about = large(profile)
    print(f"\n671B, 163 shards: {about['seconds']:.2f} s, {about['peak_bytes'] / 1e6:.0f} MB (limits 3 s, 100 MB)")
    worst = {
        name: [min(values), max(values)]
        for name in LIMITS
        if (values := [facts["errors"][name] for facts in results if "errors" in facts])
    }
    for name, (low, high) in worst.items():
        print(f"{name}: {low:+.1%} to {high:+.1%} (limits {LIMITS[name][0]:+.0%} to {LIMITS[name][1]:+.0%})")
    print(json.dumps({"card": card, "profile": profile.to_dict(), "rows": results, "worst": worst, "large": about}))
    return 0


def _line(facts: dict) -> str:
    cap = f"{facts['cap_bytes'] / 1e6:.0f} MB" if facts["cap_bytes"] else "-"
    head = f"| {facts['model']} | {facts['format']} | {facts['share']:.1%} | {cap} |"
    measured, planned = facts.get("measured", {}), facts["planned"]
    if "errors" not in facts:
        return f"{head} {facts.get('skipped') or measured.get('error')} |"
    errors = facts["errors"]
    return (
        f"{head} {planned['total_bytes'] / 1e6:.0f} / {measured['peak_bytes'] / 1e6:.0f} ({errors['peak']:+.1%}) | "
        f"{planned['decode_tok_s']['mid']:.1f} / {measured['decode_tok_s']:.1f} ({errors['decode']:+.0%}) | "
        f"{planned['prefill_tok_s']['mid']:.0f} / {measured['prefill_tok_s']:.0f} ({errors['prefill']:+.0%}) | "
        f"{planned['hit_rate']['mid']:.2f} / {measured['hit_rate']:.2f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
