"""Measure decoding with every expert in memory: moeflow by native steps and by Python's; transformers eager.

All models live in this process and take turns, so that a noisy machine touches them alike. Greedy, one sequence,
end-of-text ignored; a token's time is the median between two tokens of generate(). Then where a token's time goes.
On a GPU there are no native steps.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

from bench.device import add_device, read_bandwidth, synchronize
from bench.token_times import TokenTimes

PROMPT = "The history of the steam engine begins long before the railways. In the first century,"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; without it the demo model")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))
    parser.add_argument("--quantization", help="of moeflow's experts, such as int4; lossy")
    parser.add_argument("--tokens", type=int, default=48, help="decoded in a measurement (48)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each engine (7)")
    parser.add_argument("--threads", type=int, help="torch's threads; without it torch's own choice")
    add_device(parser)
    arguments = parser.parse_args(argv)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
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
    options = {"dtype": dtype, "device": arguments.device, "expert_memory": "100%", "predictor": None}
    options["quantization"] = arguments.quantization
    say(f"loading {folder}")
    models = {
        "transformers eager": AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager"),
        "moeflow": load_moe(folder, **options, step="python"),
    }
    if arguments.device == "cpu":
        models["moeflow native step"] = load_moe(folder, **options)
    models["transformers eager"].to(arguments.device)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"].to(arguments.device)
    bandwidth = read_bandwidth(arguments.device)
    print(
        f"{folder.name}, {arguments.dtype}, {arguments.device}, {torch.get_num_threads()} threads, "
        f"kernels: {instruction_set()}; "
        f"memory read {bandwidth / 1e9:.1f} GB/s"
    )

    outputs = {name: generate(model.eval(), ids, arguments.tokens) for name, model in models.items()}  # warm-up
    for name, output in outputs.items():
        same = int((output == outputs["transformers eager"]).long().cumprod(-1).sum()) - ids.shape[1]
        print(f"{name}: the first {same} of {arguments.tokens} tokens are transformers eager's")
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(arguments.rounds):
        say(f"round {turn + 1} of {arguments.rounds}")
        for name, model in models.items():
            times[name].append(token_s(model, ids, arguments.tokens))
    base = times["transformers eager"]
    rows = {}
    print(f"\n{'engine':22} {'ms a token':>24} {'tok/s':>7} {'x eager':>22}")
    for name, found in times.items():
        ratios = [b / t for b, t in zip(base, found, strict=True)]
        middle = statistics.median(found)
        rows[name] = {"token_s": found, "ratio_to_eager": statistics.median(ratios), "ratios": ratios}
        print(
            f"{name:22} {1e3 * middle:8.2f} ({1e3 * min(found):.2f} to {1e3 * max(found):.2f}) {1 / middle:7.1f} "
            f"{statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    parts = {name: where_time_goes(model, ids, arguments.tokens) for name, model in models.items() if name == "moeflow"}
    read_bytes = bytes_a_token(models["moeflow"])
    print(
        f"\na token reads {read_bytes / 1e6:.0f} MB: at least {1e3 * read_bytes / bandwidth:.2f} ms at that bandwidth"
    )
    step = models[list(models)[-1]].moeflow.step
    if step is not None and step.num_steps:
        parts["moeflow native step"] = {kind: value / step.num_steps for kind, value in step.seconds.items() if value}
    for name, part in parts.items():
        print(f"{name}: " + ", ".join(f"{what} {1e3 * seconds:.2f} ms" for what, seconds in part.items()))
    print(
        json.dumps(
            {
                "model": folder.name,
                "dtype": arguments.dtype,
                "device": arguments.device,
                "quantization": arguments.quantization,
                "threads": torch.get_num_threads(),
                "instruction_set": instruction_set(),
                "read_bytes_per_s": bandwidth,
                "bytes_a_token": read_bytes,
                "rows": rows,
                "parts_s": parts,
            }
        )
    )
    return 0


def say(text: str) -> None:
    """Tell progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def generate(model, ids, num_tokens: int, streamer=None):
    """Decode greedily, exactly this many tokens."""
    import torch

    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )


def token_s(model, ids, num_tokens: int) -> float:
    """Return the seconds a decode step takes: the median of the times between tokens, the first two left out."""
    clock = TokenTimes()
    generate(model, ids, num_tokens, clock)
    times = clock.times[1:]  # the prompt comes first
    return statistics.median(after - before for before, after in pairwise(times[2:]))


def where_time_goes(model, ids, num_tokens: int) -> dict[str, float]:
    """Return seconds a decode step of a model's own code spends in experts, dense linears and everything else."""
    import torch

    from moeflow.hf.experts_interface import experts_modules

    spent, watched = {"experts": 0.0, "dense linears": 0.0}, []
    experts = {module for _, module in experts_modules(model)}
    for module in model.modules():
        kind = "experts" if module in experts else "dense linears" if isinstance(module, torch.nn.Linear) else None
        if kind is None:
            continue
        inner = module.forward

        def timed(*args, _inner=inner, _kind=kind, **kwargs):
            synchronize(ids.device)
            begin = time.perf_counter()
            output = _inner(*args, **kwargs)
            synchronize(ids.device)
            spent[_kind] += time.perf_counter() - begin
            return output

        module.forward = timed
        watched.append(module)
    found = []
    try:
        for count in (2, num_tokens + 2):
            spent.update(dict.fromkeys(spent, 0.0))
            begin = time.perf_counter()
            generate(model, ids, count)
            synchronize(ids.device)
            found.append({**spent, "all": time.perf_counter() - begin})
    finally:
        for module in watched:
            del module.forward
    short, long = found
    parts = {what: (long[what] - short[what]) / num_tokens for what in long}
    parts["everything else"] = parts.pop("all") - sum(parts[what] for what in spent)
    return parts


def bytes_a_token(model) -> int:
    """Return the weights a decode step reads: top-k experts of every layer, and the dense parameters but embeddings."""
    from moeflow.hf.experts_interface import num_experts_per_tok

    experts = sum(source.layout.record.num_bytes for source in model.moeflow.store.layers) * num_experts_per_tok(model)
    embedding = model.get_input_embeddings().weight
    dense = sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)
    head = model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == embedding.data_ptr()
    return experts + dense + (embedding.numel() * embedding.element_size() if tied else 0)


if __name__ == "__main__":
    raise SystemExit(main())
