"""Measure native steps of the engine: how many times as fast it decodes with step="auto" as with step="python".

    python scripts/bench_engine_step.py MODEL [--batches 1 8 32] [--rounds 7] [--steps 8] [--threads 1] [--memory 100%]

For each batch size both engines decode so many sequences, some steps in turn, in one process: the machine's noise
meets both. Prompts have 16 to 47 tokens. The ratio is that of the times of a round, as median and range. Beside it, the
milliseconds of a native step by kind of instruction. The last line is one JSON object.
"""

import argparse
import json
from contextlib import ExitStack
from functools import partial

import torch

from bench.rounds import Case, quotients, ranged, take_turns
from moeflow import Engine, SamplingParams, load_moe


def main(argv=None) -> None:
    """Print a line for each batch size, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, such as the demo model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="in a round of each engine")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", default="100%", help="expert_memory of both")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    with ExitStack() as stack:
        models = {step: load(arguments, step, stack) for step in ("python", "auto")}
        print(json.dumps({size: bench_batch(models, size, arguments) for size in arguments.batches}))


def load(arguments, step, stack):
    """Load the model; it is closed at the end."""
    options = {"expert_memory": arguments.memory, "dtype": arguments.dtype, "predictor": None, "device": "cpu"}
    model = load_moe(arguments.model, step=step, **options)
    stack.enter_context(model.moeflow)
    return model


def bench_batch(models, size, arguments) -> dict:
    """Decode `size` sequences by both models in turn, and return the ratio and the times by kind."""
    with ExitStack() as stack:
        engines = {step: stack.enter_context(begin(model, size, arguments)) for step, model in models.items()}
        cases = [Case(step, partial(run, engine, arguments.steps), 0) for step, engine in engines.items()]
        native = models["auto"].moeflow.step
        run(engines["auto"], 2)  # captures the program
        run(engines["python"], 2)
        before, steps = native.seconds, native.num_steps
        times = take_turns(cases, arguments.rounds)
        steps = native.num_steps - steps
        kinds = {kind: 1000 * (total - before.get(kind, 0)) / max(steps, 1) for kind, total in native.seconds.items()}
    ratio = quotients(times["python"], times["auto"])
    step_ms = {step: 1000 * sorted(taken)[len(taken) // 2] / arguments.steps for step, taken in times.items()}
    parts = ", ".join(
        f"{kind} {ms:.2f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]) if ms >= 0.005
    )
    print(f"batch of {size:2}: native step {ranged(ratio, 1, 5, 2)} times as fast", end="   ")
    print(
        f"{step_ms['python']:.1f} -> {step_ms['auto']:.1f} ms a step, {steps} native; ms by kind: {parts}", flush=True
    )
    return {"ratio": ratio, "step_ms": step_ms, "kinds_ms": kinds, "native_steps": steps}


def begin(model, size, arguments):
    """Make an engine whose sequences have all begun to decode."""
    engine = Engine(model, max_batch_size=size, max_step_tokens=4096)
    generator = torch.Generator().manual_seed(0)
    new_tokens = (arguments.rounds + 1) * arguments.steps + 8
    for number in range(size):
        prompt = torch.randint(3, model.config.vocab_size, (16 + number % 32,), generator=generator).tolist()
        engine.add(prompt, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    engine.step()
    return engine


def run(engine, num_steps) -> None:
    """Run some steps."""
    for _ in range(num_steps):
        engine.step()


if __name__ == "__main__":
    main()
