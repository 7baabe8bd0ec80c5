"""One rank of test_parallel.py: runs every situation in one process and writes down what it saw.

    RANK=0 WORLD_SIZE=2 python tests/helpers/parallel_ranks.py FOLDERS.json OUT

FOLDERS.json says where the checkpoints are; OUT also holds the file that the ranks find each other by.
"""

import contextlib
import gc
import json
import os
import shutil
import sys
import threading
import weakref
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moeflow import load_moe
from moeflow.expert_parallel import expert_parallel
from moeflow.hf import experts_interface
from moeflow.placement.plan import Plan

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def replicated_plan(num_gpus, num_layers=3, num_experts=8):
    """Experts in turn over the GPUs; 0 and 3 on all of them, 5 on the first and the last."""
    holders = [[expert % num_gpus] for expert in range(num_experts)]
    holders[0] = holders[3] = list(range(num_gpus))
    holders[5] = [0, num_gpus - 1]
    return Plan(num_gpus, tuple(tuple(map(tuple, holders)) for _ in range(num_layers)))


def sizes(model):
    """(L, E)."""
    counts = model.moeflow.experts_per_layer
    return len(counts), counts[0]


def prompts_of(rank, num_ranks):
    """Token ids of a rank's prompts: of different lengths, more for some; of four ranks the last has none."""
    if rank == 3:
        return []
    lengths = [3 + 5 * rank, 9][: 1 + (rank == 1)]
    return [torch.arange(1 + rank, 1 + rank + length).unsqueeze(0) for length in lengths]


def num_new_tokens_of(rank):
    return 2 + 3 * rank


def few_of(rank):
    """Prompts so short that no expert has more than eight rows with all ranks' together."""
    return torch.arange(5 + rank, 7 + rank).unsqueeze(0)


def load(folder, **options):
    return load_moe(folder, **{"device": "cpu", "predictor": None, "expert_memory": "50%", **options})


@torch.no_grad()
def answers(model, prompts, num_new_tokens):
    """Logits of each prompt, and what is generated after it."""
    return [
        (model(prompt).logits, model.generate(prompt, max_new_tokens=num_new_tokens, do_sample=False))
        for prompt in prompts
    ]


@contextlib.contextmanager
def counted_calls(model):
    """Collect [E] counts of every call of each experts module; a number of E or more is no expert."""
    (num_layers, num_experts), hooks = sizes(model), []
    calls = [[] for _ in range(num_layers)]
    for layer, (_, module) in enumerate(experts_interface.experts_modules(model)):

        def count(module, args, kwargs, layer=layer):
            _, top_k_index, _ = experts_interface.experts_arguments(args, kwargs)
            calls[layer].append(torch.bincount(top_k_index.flatten(), minlength=num_experts)[:num_experts])

        hooks.append(module.register_forward_pre_hook(count, with_kwargs=True))
    yield calls
    for hook in hooks:
        hook.remove()


def outcome(call):
    """The name and message of what a call raises, or "nothing"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def run_family(folder):
    """What each plan gives: answers, calls, resident experts, traffic."""
    seen = {}
    for name in ("contiguous", "replicated"):
        with (model := load(folder)).moeflow, counted_calls(model) as calls:
            plan = None if name == "contiguous" else replicated_plan(WORLD_SIZE, *sizes(model))
            parallel = expert_parallel.apply(model, plan)
            with parallel.session(), torch.no_grad():
                given = answers(model, prompts_of(RANK, WORLD_SIZE), num_new_tokens_of(RANK))
            seen[name] = {
                "answers": given,
                "calls": calls,
                "resident": sorted(model.moeflow.cache.slots),
                "traffic": parallel.stats(),
                "plan": parallel.plan,
            }
            model.moeflow.check_integrity()
            assert model.moeflow.step.num_steps == 0, "a step of several ranks ran natively"
    return seen


def run_equal_homes(folder):
    """The same prompt on all ranks: the counts, and what was sent by each plan."""
    seen = {}
    for name in ("contiguous", "replicated"):
        with (model := load(folder)).moeflow, counted_calls(model) as calls:
            plan = None if name == "contiguous" else replicated_plan(WORLD_SIZE, *sizes(model))
            parallel = expert_parallel.apply(model, plan)
            with parallel.session(), torch.no_grad():
                model(torch.arange(1, 41).unsqueeze(0))
            seen[name] = {"calls": calls, "traffic": parallel.stats(), "plan": parallel.plan}
    return seen


@torch.no_grad()
def run_few(folder, dtype):
    with (model := load(folder, dtype=dtype)).moeflow, expert_parallel.apply(model).session():
        return model(few_of(RANK)).logits


@torch.no_grad()
def own_passes(model, rank):
    """What a rank runs so that ranks are in different layers: rank 0 the last layer alone, others the whole model."""
    if rank:
        return [model(prompt).logits for prompt in prompts_of(1, 2)]
    experts = experts_interface.experts_modules(model)[-1][1]
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(5, 64, generator=generator)
    top_k_index, weights = torch.randint(0, 8, (5, 2), generator=generator), torch.rand(5, 2, generator=generator)
    return [experts(hidden_states[:n], top_k_index[:n], weights[:n]) for n in (5, 1, 0, 4)]


def run_apart(folder):
    with (model := load(folder)).moeflow, expert_parallel.apply(model).session():
        return own_passes(model, RANK)


@torch.no_grad()
def run_failures(folder, out):
    """What every rank raises when one fails, in layers and in reads, and whether all can go on afterwards."""
    folder = shutil.copytree(folder, out / f"own{RANK}")
    seen, prompt = {}, torch.arange(1, 12).unsqueeze(0)
    with (model := load(folder, expert_memory="20%")).moeflow:
        parallel = expert_parallel.apply(model)
        seen["outside"] = outcome(lambda: model(prompt))

        def run():
            with parallel.session():
                model(prompt)

        def fail(*args):
            raise ValueError("this rank's own mistake")

        hook = model.model.layers[1].register_forward_pre_hook(fail) if RANK == 1 else None
        seen["mistake"] = outcome(run)
        if hook is not None:
            hook.remove()
        seen["after_mistake"] = outcome(run)

        files = {file: file.read_bytes() for file in model.moeflow.store.files} if RANK == 0 else {}
        times = {file: (file.stat().st_atime_ns, file.stat().st_mtime_ns) for file in files}
        for file in files:
            os.truncate(file, 4096)
        seen["read"] = outcome(run)
        for file, data in files.items():
            file.write_bytes(data)
            os.utime(file, ns=times[file])
        with parallel.session():
            seen["logits"] = model(prompt).logits

        def run_twice():
            with parallel.session():
                with contextlib.suppress(Exception):
                    if RANK == 1:
                        raise ValueError("one that this rank gets over by itself")
                model(prompt)

        seen["got_over"] = outcome(run_twice)
        seen["nested"] = outcome(lambda: _nested(parallel))
        model.moeflow.check_integrity()
    return seen


def _nested(parallel):
    with parallel.session(), parallel.session():
        pass


def run_refusals(folder):
    """What `apply` says to plans and models that do not fit."""
    seen, right = {}, replicated_plan(WORLD_SIZE)
    with (model := load(folder)).moeflow:

        def apply(plan):
            return outcome(lambda: expert_parallel.apply(model, plan))

        seen["ranks"] = apply(replicated_plan(WORLD_SIZE + 1))
        seen["layers"] = apply(Plan(WORLD_SIZE, right.experts[:2]))
        seen["experts"] = apply(Plan(WORLD_SIZE, tuple(layer[:7] for layer in right.experts)))
        seen["no file"] = apply(Path("nowhere.json"))
        seen["one rank"] = apply(right if RANK else Path("nowhere.json"))
        seen["other plan"] = apply(right if RANK else None)
    with (model := load(folder, predictor="markov")).moeflow:
        seen["predictor"] = outcome(lambda: expert_parallel.apply(model))
    return seen


def run_leaks(folder):
    """Whether a model and its threads are gone once nobody holds it."""
    gc.collect()
    threads = threading.active_count()
    model = load(folder)
    with expert_parallel.apply(model).session(), torch.no_grad():
        model(torch.arange(1, 5).unsqueeze(0))
    gone = [weakref.ref(model.moeflow), weakref.ref(model.moeflow.parallel)]
    del model
    gc.collect()
    return {"alive": [ref() for ref in gone if ref() is not None], "threads": threading.active_count() - threads}


def run_death(folder):
    """The last rank ends in the middle; what the others raise."""
    model = load(folder)
    parallel = expert_parallel.apply(model)

    def run():
        with parallel.session(), torch.no_grad():
            model(torch.arange(1, 5).unsqueeze(0))
            if RANK == WORLD_SIZE - 1:
                os._exit(0)
            model(torch.arange(1, 5).unsqueeze(0))

    return {"death": outcome(run), "then": outcome(run)}


def main(folders, out):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=RANK, world_size=WORLD_SIZE, timeout=timedelta(seconds=180)
    )
    mixtral = folders["mixtral"]
    seen = {
        "families": {name: run_family(folder) for name, folder in folders.items()},
        "equal homes": run_equal_homes(mixtral),
        "few": {str(dtype): run_few(mixtral, dtype) for dtype in (torch.float32, torch.bfloat16)},
        "apart": run_apart(mixtral),
        "failures": run_failures(mixtral, out),
    }
    if WORLD_SIZE == 2:
        seen |= {"refusals": run_refusals(mixtral), "leaks": run_leaks(mixtral)}
    torch.save(seen, out / f"rank{RANK}.pt")
    seen = run_death(mixtral)
    torch.save(seen, out / f"death{RANK}.pt")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # as `moeflow parallel` ends
