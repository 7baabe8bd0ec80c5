"""Count what a decode step costs the host on a GPU, without one: waits, kernels and copies a MoE layer, and Python.

A small random model runs its layers on fake tensors of "cuda:0": they have no values, so that what would wait for the
device raises. Its Python is timed on a card that takes every launch and runs nothing (tests/helpers/null_card.py): all
of the host's code but the driver's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HIDDEN, EXPERTS, TOP_K = 64, 8, 2
KERNELS_OF = {"moeflow.triton_experts_lookup.default": 2, "moeflow.triton_experts_decode.default": 2}
COLUMNS = ("host waits", "kernels", "copies", "async copies")  # the host waits for copies, and not for async ones
# At most, of a layer whose experts are all resident: in a step that asks for nothing, and in one that is predicted,
# where the host waits for the routes once the layer is launched.
WISHES = {"host waits": 0, "kernels": 3, "copies": 0, "async copies": 0}
PREDICTED_WISHES = {"host waits": 1, "copies": 0, "async copies": 1}
PREDICTORS = ("markov", "lookahead")  # one that sees the routes, and one that sees the residual stream too
MOST_KERNELS = 12  # that a model compiles
HOST_MS = 2.0  # of a step's Python, at most
_COMPILATIONS = """
import json
from helpers.triton_compile import DTYPES, all_models, count_kernels
pairs = [(model, dtype) for model in all_models() for dtype in DTYPES]
print(json.dumps({f"{model.name} {dtype}": count_kernels(model, dtype) for model, dtype in pairs}))
"""


def main(argv: list[str] | None = None) -> int:
    """Count and print; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48, help="of a step whose Python is timed (48)")
    parser.add_argument("--rounds", type=int, default=50, help="steps that are timed (50)")
    parser.add_argument("--tokens", default="1,4,16", help="of a step, with commas (1,4,16)")
    parser.add_argument("--no-kernels", action="store_true", help="do not count the kernels that a model compiles")
    parser.add_argument("--on-null-card", action="store_true", help=argparse.SUPPRESS)  # the part that is timed
    arguments = parser.parse_args(argv)
    if arguments.on_null_card:
        print(json.dumps(time_on_null_card(arguments)))
        return 0
    os.environ.setdefault("TRITON_INTERPRET", "1")  # without a card; no kernel runs here

    import torch

    from bench.machine import describe, print_card

    about = describe("moeflow", "torch", "triton")
    print_card({"machine": f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}; no GPU is used"})
    numbers = list(map(int, arguments.tokens.split(",")))
    result: dict = {"card": about, "layers": {}, "predicted": {}, "host_ms": {}}
    print(f"{'a layer whose experts are resident':40}" + "".join(f"{name:>{len(name) + 2}}" for name in COLUMNS))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = small_model(folder)
        try:
            for tokens in numbers:
                result["layers"][tokens] = print_counts(f"{tokens} tokens", count_layer(model, tokens))
        finally:
            model.moeflow.close()
        for name in PREDICTORS:
            counts = result["predicted"][name] = {}
            for tokens in numbers:
                counts[tokens] = print_counts(f"{tokens} tokens, {name}", count_predicted_layer(folder, name, tokens))
    command = [__file__, "--on-null-card", "--tokens", arguments.tokens]
    command += ["--layers", str(arguments.layers), "--rounds", str(arguments.rounds)]
    for tokens, times in run_compiled(command).items():
        result["host_ms"][tokens] = times
        what = f"Python of {arguments.layers} layers, {tokens} tokens"
        print(f"{what:40}{statistics.median(times):8.2f} ms ({min(times):.2f} to {max(times):.2f}), wish {HOST_MS}")
    if not arguments.no_kernels:
        result["kernels"] = count_compilations()
    within = all(is_within(counts, WISHES) for counts in result["layers"].values())
    predicted = [counts for of_predictor in result["predicted"].values() for counts in of_predictor.values()]
    within = within and all(is_within(counts, PREDICTED_WISHES) for counts in predicted)
    within = within and max(result.get("kernels", {}).values(), default=0) <= MOST_KERNELS
    print(json.dumps(result))
    return 0 if within else 1


def is_within(counts: dict[str, int], wishes: dict[str, int]) -> bool:
    """Tell whether a layer asks for no more than is wished."""
    return all(counts[name] <= most for name, most in wishes.items())


def print_counts(what: str, counts: dict[str, int]) -> dict[str, int]:
    """Print a row of the table and return its counts."""
    print(f"{what:40}" + "".join(f"{counts[name]:{len(name) + 2}}" for name in COLUMNS))
    return counts


def count_compilations() -> dict[str, int]:
    """Print how many kernels a model of each format compiles, by tests/helpers/triton_compile.py, and return it."""
    found = run_compiled(["-c", _COMPILATIONS])
    most = max(found, key=lambda name: found[name])
    print(f"kernels that a model compiles, of {len(found)} formats, activations and dtypes: {min(found.values())} to "
          f"{found[most]} ({most}); at most {MOST_KERNELS} are allowed")  # fmt: skip
    return found


def run_compiled(command: list[str]) -> dict:
    """Run Python without the interpreter, beside the tests' helpers; return the JSON object that it prints last."""
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "tests"), environment.get("PYTHONPATH", "")))
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a part failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def time_on_null_card(arguments) -> dict[int, list[float]]:
    """Return the milliseconds of a step's Python in each round, by its tokens, where launches run nothing."""
    import torch

    from helpers.null_card import NullCard
    from moeflow.kernels.triton.experts import TritonExperts, find_plan

    NullCard()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = small_model(folder)
        try:
            module = model.model.layers[0].mlp.experts
            compute, record = module._moeflow._computes[torch.bfloat16], model.moeflow.records(0)[0]
            compute._of_all = TritonExperts(find_plan(record, compute._activation, is_transposed=False))
            numbers = map(int, arguments.tokens.split(","))
            return {tokens: time_step(model, tokens, arguments.layers, arguments.rounds) for tokens in numbers}
        finally:
            model.moeflow.close()


def small_model(folder: str, num_layers: int = 1, predictor: str | None = None):
    """Load a random Mixtral whose first layer's experts are Triton's."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from moeflow import load_moe
    from moeflow.kernels.activations import recognise
    from moeflow.moe.triton_compute import TritonCompute

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=num_layers,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    room = "auto" if predictor is None else "75%"  # with room for all nothing is predicted
    model = load_moe(folder, device="cpu", predictor=predictor, step="python", expert_memory=room)
    module = model.model.layers[0].mlp.experts
    compute = TritonCompute(recognise(module._apply_gate, True), module.is_transposed)
    compute.can_run(model.moeflow.records(0))
    module._moeflow._computes[torch.bfloat16] = compute
    return model


def layer_on(model, device: str, tokens: int):
    """Return the layer's experts, in a step on a device that trusts that all are resident, and its arguments."""
    import torch

    from moeflow.offload.trusting.device_table import DeviceTable
    from moeflow.offload.trusting.trusted_step import TrustedStep
    from moeflow.offload.trusting.trusting import Trusting

    runtime, experts = model.moeflow, model.model.layers[0].mlp.experts._moeflow
    base = torch.empty(EXPERTS, runtime._slot_bytes, dtype=torch.uint8, device=device)
    runtime.device = torch.device(device)
    pool = SimpleNamespace(base=base)  # a SlotPool asks for addresses, which fakes have not
    runtime.trusting = Trusting(DeviceTable(runtime.cache, pool, runtime.experts_per_layer), runtime._stats)
    runtime.trusting.step = TrustedStep(runtime.trusting.table)
    hidden_states = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device=device)
    index = torch.empty(tokens, TOP_K, dtype=torch.int64, device=device)
    return experts, (hidden_states, index, torch.empty(tokens, TOP_K, dtype=torch.bfloat16, device=device))


def count_layer(model, tokens: int) -> dict[str, int]:
    """Run a layer of a step that asks for nothing on fake tensors of a GPU, and count what it asks of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        experts, arguments = layer_on(model, "cuda:0", tokens)
        return count_run(dict.fromkeys(COLUMNS, 0), experts, arguments)


def count_predicted_layer(folder: str, predictor: str, tokens: int) -> dict[str, int]:
    """Do the same in a step that is predicted. What comes down is written into the host's memory here: expert 0."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moeflow.core import ExpertKey
    from moeflow.offload.streams import HostStreams
    from moeflow.offload.trusting.downloads import Downloads

    counts = dict.fromkeys(COLUMNS, 0)

    class Counted(HostStreams):
        def bring_down(self, target, source):
            counts["async copies"] += 1

        def synchronize(self, event):
            counts["host waits"] += 1

    model = small_model(folder, 2, predictor)
    runtime = model.moeflow
    try:
        list(runtime.fetch(0, list(range(EXPERTS))))
        runtime.begin_forward(tokens, 1, continues=False)
        runtime.begin_forward(tokens, 1, continues=True, token_ids=torch.zeros(tokens, 1, dtype=torch.int64))
        assert runtime.predicting, "the step is not predicted"
        runtime.downloads = Downloads(Counted(), is_pinned=False)
        runtime.downloads.start(torch.zeros(1 << 16, dtype=torch.uint8)).wait()[:] = 0
        counts.update(dict.fromkeys(COLUMNS, 0))
        with FakeTensorMode(allow_non_fake_inputs=True):
            experts, arguments = layer_on(model, "cuda:0", tokens)
            runtime.trusting.step = None
            runtime.trusting.table._slots[0] = [runtime.cache.slot(ExpertKey(0, expert)) for expert in range(EXPERTS)]
            runtime.cache.moved.clear()
            if runtime.predictor.signal == "residual":
                runtime.prediction._tap.residual = lambda layer, hidden_states: hidden_states
                runtime.predictor._routers = torch.empty(2, EXPERTS, HIDDEN, device="cuda:0")
                runtime.predictor._rows_to_check[:] = 0  # as after its first steps
            count_run(counts, experts, arguments)
        assert runtime.stats()["prediction"]["failure"] is None, runtime.stats()["prediction"]["failure"]
        assert runtime.stats()["decode"]["hits"] == 1, "the layer was not launched before it asked"
        return counts
    finally:
        model.moeflow.close()


def count_run(counts: dict[str, int], experts, arguments) -> dict[str, int]:
    """Run a layer on fake tensors of a GPU and count what it asks of it."""
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            made = func(*args, **(kwargs or {}))
            if "_local_scalar_dense" in name or "nonzero" in name:
                counts["host waits"] += 1
            elif "copy" in name and len({one.device for one in (*args, made) if hasattr(one, "device")}) > 1:
                counts["copies"] += 1
            elif name in KERNELS_OF:
                counts["kernels"] += KERNELS_OF[name]
            elif not (func.is_view or "empty" in name or "detach" in name or "prim.device" in name):
                counts["kernels"] += 1
            return made

    try:
        with Count():
            experts.run(*arguments)
    except DataDependentOutputException:
        counts["host waits"] += 1
    return counts


def time_step(model, tokens: int, num_layers: int, rounds: int) -> list[float]:
    """Return the milliseconds of Python of so many layers, in each round."""
    experts, arguments = layer_on(model, "cpu", tokens)
    times = []
    for _ in range(rounds + 3):
        begin = time.perf_counter()
        for _ in range(num_layers):
            experts.run(*arguments)
        times.append(1e3 * (time.perf_counter() - begin))
    return times[3:]


if __name__ == "__main__":
    sys.exit(main())
