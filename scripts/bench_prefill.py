"""Measure the time to a prompt's first token: moeflow at several budgets, and transformers eager; where it goes.

All models live in this process and take turns, prompt by prompt, so that a noisy machine touches them alike. A time is
that of one call of generate() for one token. Ratios are made round by round. Then each part's share of that time, of
one more round with clocks around modules and kernels.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from bench.device import add_device, synchronize
from bench.rounds import Case, quotients, ranged, spread, take_turns

ROOT = Path(__file__).resolve().parent.parent
EAGER = "transformers eager"
PARTS = {
    "experts' kernels": "the compiled kernels of the routed experts",
    "experts' Python": "what else the experts' modules do: grouping, residency, sums, and waits for reads",
    "waits for reads": "the part of it in which compute stood still",
    "router": "the routers' modules",
    "attention": "the attention modules without their linears",
    "linears": "all dense linears but the last",
    "norms": "all norms",
    "lm_head": "logits",
}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; without it the demo model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 36, 128, 512], help="tokens (8 36 128 512)")
    parser.add_argument("--expert-memory", nargs="+", default=["100%", "25%"], metavar="SIZE", help="(100%% 25%%)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each prompt (7)")
    parser.add_argument("--threads", type=int, help="torch's threads; without it torch's own choice")
    add_device(parser)
    arguments = parser.parse_args(argv)

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from moeflow import load_moe
    from moeflow.demo.model import default_demo_path
    from moeflow.kernels.cpu.library import instruction_set

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(arguments.model) if arguments.model else default_demo_path()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    eager = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    models = {EAGER: eager.to(arguments.device)}
    for budget in arguments.expert_memory:
        options = {"device": arguments.device, "expert_memory": budget, "predictor": None}
        models[f"moeflow {budget}"] = load_moe(folder, dtype=dtype, **options)
    print(
        f"{folder.name}, {arguments.dtype}, {arguments.device}, {torch.get_num_threads()} threads, "
        f"kernels: {instruction_set()}, "
        f"{arguments.rounds} rounds in turn"
    )
    rows = []
    for length in arguments.prompts:
        print(f"prompt of {length} tokens: reading", file=sys.stderr, flush=True)
        rows += measure(models, prompt(folder, length).to(arguments.device), arguments.rounds)
    about = {"model": folder.name, "dtype": arguments.dtype, "device": arguments.device}
    print(json.dumps({**about, "threads": torch.get_num_threads(), "rows": rows}))
    return 0


def prompt(folder: Path, length: int):
    """Return the first tokens of this project's own English: [1, length]."""
    from transformers import AutoTokenizer

    text = (ROOT / "docs" / "architecture.md").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    if ids.shape[1] < length:
        raise SystemExit(f"a prompt of {length} tokens: the text has {ids.shape[1]}. Give fewer.")
    return ids[:, :length]


def measure(models: dict, ids, rounds: int) -> list[dict]:
    """Time all models over one prompt in turns; print and return their rows."""
    times = take_turns(
        [Case(name, lambda model=model: first_token(model, ids), 0) for name, model in models.items()], rounds
    )
    print(f"\nprompt of {ids.shape[1]} tokens")
    rows = []
    for name, found in times.items():
        ratio = quotients(times[EAGER], found)
        print(f"  {name:20} {ranged(spread(found), 1e3, 8, 1)} ms, {ranged(ratio, 1, 6, 2)} times as fast as eager")
        row = {"engine": name, "tokens": ids.shape[1], "seconds": found, "ratio_to_eager": ratio}
        if name != EAGER:
            row["shares"] = shares(models[name], ids, rounds)
            print(
                "    " + ", ".join(f"{part} {100 * share:.1f} %" for part, share in row["shares"].items()), flush=True
            )
        rows.append(row)
    return rows


def first_token(model, ids) -> None:
    """Compute one token behind a prompt."""
    import torch

    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
    synchronize(ids.device)


def shares(model, ids, rounds: int) -> dict[str, float]:
    """Return the share of each of `PARTS`, and of the rest, in the time to the first token: medians of all rounds."""
    found: list[dict[str, float]] = []
    with Clocks(model) as clocks:
        for _ in range(rounds):
            clocks.spent.clear()
            stall_s, begin = model.moeflow.snapshot().prefill.stall_s, time.perf_counter()
            first_token(model, ids)
            whole, spent = time.perf_counter() - begin, dict(clocks.spent)
            kernels = spent.get("experts' kernels", 0.0)
            spent["experts' Python"] = spent["experts"] - kernels
            spent["waits for reads"] = model.moeflow.snapshot().prefill.stall_s - stall_s
            spent["attention"] -= spent["attention's linears"]
            counted = [part for part in PARTS if part != "waits for reads"]
            spent["everything else"] = whole - sum(spent.get(part, 0.0) for part in counted)
            found.append({part: spent.get(part, 0.0) / whole for part in (*PARTS, "everything else")})
    return {part: statistics.median(one[part] for one in found) for part in found[0]}


class Clocks:
    """Clocks around a model's modules and around the compiled kernels of experts, while it is entered.

    Attributes:
        spent: seconds by part; "experts" and "attention" are whole modules.
    """

    def __init__(self, model) -> None:
        import torch

        from moeflow.hf.experts_interface import experts_modules

        self.spent: dict[str, float] = {}
        self._device = model.device
        self._changed: list[tuple[object, str, object]] = []
        experts = {module for _, module in experts_modules(model)}
        self._modules = []
        for name, module in model.named_modules():
            kind, path = type(module).__name__, name.split(".")
            if module in experts:
                self._modules.append((module, ["experts"]))
            elif isinstance(module, torch.nn.Linear):
                within = ["attention's linears"] if any("attn" in part or "attention" in part for part in path) else []
                self._modules.append((module, ["lm_head"] if path[-1] == "lm_head" else ["linears", *within]))
            elif kind.endswith("Norm"):
                self._modules.append((module, ["norms"]))
            elif kind.endswith("Attention"):
                self._modules.append((module, ["attention"]))
            elif kind.endswith(("Router", "Gate")):
                self._modules.append((module, ["router"]))

    def __enter__(self) -> "Clocks":
        from moeflow.kernels.cpu.library import library

        for module, parts in self._modules:
            self._put(module, "forward", parts)
        found = library()
        for functions in () if found is None else (found.held, found.free):
            for name in ("moeflow_cpu_layer", "moeflow_cpu_experts", "moeflow_cpu_token", "moeflow_cpu_combine"):
                if name in vars(functions):
                    self._put(functions, name, ["experts' kernels"])
        return self

    def __exit__(self, *exc_info: object) -> None:
        for owner, name, before in self._changed:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def _put(self, owner, name: str, parts: list[str]) -> None:
        inner = getattr(owner, name)
        self._changed.append((owner, name, vars(owner).get(name)))

        def timed(*args, **kwargs):
            synchronize(self._device)  # on a GPU a part's own time, without what runs beside it
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                synchronize(self._device)
                seconds = time.perf_counter() - begin
                for part in parts:
                    self.spent[part] = self.spent.get(part, 0.0) + seconds

        setattr(owner, name, timed)


if __name__ == "__main__":
    raise SystemExit(main())
