"""Calls every entry of the compiled libraries with arguments of wrong shape, dtype, device, stride, count and kind.

Run as a script: the number of calls, a seed. A call may be refused, or must compute what plain torch, numpy or the
Python loop does. Prints the numbers of refused and computed calls; ends with a traceback where a result is wrong or a
call raised anything but a refusal, and by a signal where an entry was not checked.
"""

import ctypes
import random
import sys
from collections import Counter
from copy import copy

import numpy as np
import torch

from helpers.cpu_experts import Expert
from helpers.lossless_experts import both
from helpers.placement_problems import random_problem
from helpers.wrong_arguments import DTYPES, INNER, SIZES, WRONG, H, count, near, numbers, tensor
from moeflow.core import TensorSpec
from moeflow.engine.regrouping.oracles.best_split import best_split
from moeflow.engine.regrouping.search import Search, active_pairs
from moeflow.errors import MoeflowError
from moeflow.hf import dense_kernels
from moeflow.kernels.cpu import lossless as lossless_codes
from moeflow.kernels.cpu import ops as cpu
from moeflow.kernels.cpu.layer import LayerKernel
from moeflow.kernels.cpu.structs import ExpertKernel
from moeflow.placement.solvers.anneal import Annealing
from moeflow.placement.solvers.baselines import random_placement
from moeflow.placement.tables import Tables
from moeflow.replay import demand
from moeflow.replay.demand_loop import replay_loop

REFUSALS = (MoeflowError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, ctypes.ArgumentError)
"""What a wrong argument may raise: ours, or Python's own for an object of the wrong kind."""


def by_torch(call, *arguments):
    """Call what torch looks at first: an exception of torch's own is a refusal."""
    try:
        return call(*arguments)
    except (RuntimeError, IndexError) as error:
        raise ValueError("torch's own") from error


def repeat(item, times):
    """Return a list of an item; a count that is none, negative or too long raises."""
    if not 0 <= times <= 1000:
        raise ValueError(times)
    return [item] * times


def experts(draw):
    expert, x = draw.choice(EXPERTS), tensor(draw, 3, H)
    tokens, starts, outputs = numbers(draw, [0, 1, 2]), numbers(draw, [0, 2, 3]), tensor(draw, 3, H)
    addresses = [draw.choice((0, None)) if draw.random() < WRONG / 2 else expert.address for _ in range(2)]
    kernels = [
        draw.choice(KERNELS) if draw.random() < WRONG else expert.kernel for _ in range(draw.choice((2, 2, 2, 1)))
    ]
    places, bits = numbers(draw, [2, 0, 1]), 0 if draw.random() > WRONG else count(draw, 16)
    cpu.run_experts(x, kernels, addresses, starts, tokens, places, outputs, activation_bits=bits)
    if (
        tokens == [0, 1, 2]
        and places == [2, 0, 1]
        and starts == [0, 2, 3]
        and kernels == [expert.kernel] * 2
        and not bits
    ):
        near(outputs[places], expert.expected(x))


def token(draw):
    number = count(draw, draw.choice((1, 2, 64)))
    expert, x = draw.choice(EXPERTS), tensor(draw, 1, H)
    kernels, addresses = repeat(expert.kernel, number), repeat(expert.address, number)
    weights = tensor(draw, 1, number if draw.random() > WRONG else draw.choice((0, 1, 65)))
    if draw.random() < WRONG / 2:
        addresses = draw.choice((addresses[1:], [*addresses, 0], [0] * len(addresses)))
    bits = count(draw, 0)
    out = cpu.run_token(x, kernels, addresses, weights, activation_bits=bits)
    if not bits:
        near(out.flatten(), (expert.expected(x.reshape(1, H)) * weights.double().sum()).flatten(), 1e-3)


def layer(draw):
    expert, x = draw.choice(EXPERTS), tensor(draw, 3, H)
    index = tensor(draw, 3, 2, dtype=torch.int64)
    if isinstance(index, torch.Tensor) and index.dtype is torch.int64 and index.is_cpu and index.shape == (3, 2):
        index = torch.tensor([[0, 2], [1, 0], [0, draw.choice((1, 1, 4, -1, 2**62))]])
    weights = tensor(draw, 3, 2)
    addresses = [draw.choice((0, None)) if draw.random() < WRONG / 2 else expert.address for _ in range(3)]
    if draw.random() < WRONG:
        addresses = draw.choice((addresses[1:], [*addresses, 0], [[*addresses]]))
    addresses = np.array(addresses, draw.choice((np.int64, np.float64)) if draw.random() < WRONG / 2 else np.int64)
    kernels = [draw.choice(KERNELS) if draw.random() < WRONG / 4 else expert.kernel for _ in range(3)]
    bits = count(draw, 0)
    found = LayerKernel(kernels, bits).run(x, index, weights, addresses)
    if found is None:
        raise ValueError("an expert is missing")
    if bits == 0:
        factors = torch.where(index < 3, weights.double(), 0).sum(1, keepdim=True)
        near(found.hidden_states, expert.expected(x) * factors, 1e-3)


def combine(draw):
    num_tokens, top_k = draw.choice((0, 1, 3)), draw.choice((0, 1, 2, 65))
    outputs, weights = tensor(draw, num_tokens * top_k, H), tensor(draw, num_tokens, top_k)
    dtype = torch.float32 if draw.random() > WRONG else draw.choice((*DTYPES, None))
    found = cpu.combine(outputs, weights, dtype)
    width = outputs.shape[1]
    near(found, (outputs.view(*weights.shape, width).double() * weights.double()[..., None]).sum(1), 1e-2)


def linear(draw):
    x, weight, bias = tensor(draw, 2, H), tensor(draw, 8, H), tensor(draw, 8) if draw.random() < 0.5 else None
    found = by_torch(torch.ops.moeflow.linear, x, weight, bias) if draw.random() < 0.3 else cpu.linear(x, weight, bias)
    if found is None:
        raise ValueError("not the kernel's")
    near(found, torch.nn.functional.linear(x.double(), weight.double(), bias if bias is None else bias.double()))


def module(draw):
    """A layer whose weights were replaced: any exception is torch's own."""
    made = torch.nn.Linear(H, 8)
    made.__class__ = dense_kernels.FewTokensLinear
    made.weight = torch.nn.Parameter(weight, False) if isinstance(weight := tensor(draw, 8, H), torch.Tensor) else None
    made.bias = torch.nn.Parameter(bias, False) if isinstance(bias := tensor(draw, 8), torch.Tensor) else None
    x = tensor(draw, 2, H)
    found, wanted = by_torch(made, x), by_torch(torch.nn.functional.linear, x, made.weight, made.bias)
    near(found, wanted)


def norm(draw):
    x, weight = tensor(draw, 2, H), tensor(draw, H)
    found = (
        by_torch(torch.ops.moeflow.rms_norm, x, weight, 1e-6) if draw.random() < 0.3 else cpu.rms_norm(x, weight, 1e-6)
    )
    if found is None or found.is_meta:
        raise ValueError("not the kernel's")
    wide = x.double()
    near(found, weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6), 1e-3)


def lossless(draw):
    """A matrix without loss, written, read and multiplied; its bytes may be damaged."""
    weight = tensor(draw, 8, H, dtype=torch.bfloat16)
    room = lossless_codes.count_escapes(weight) + 3
    parts = [
        tensor(draw, 8, 96, dtype=torch.uint8),
        tensor(draw, 8, dtype=torch.uint16),
        tensor(draw, 5 * (room if draw.random() > WRONG else draw.choice((1, 3, room + 1))), dtype=torch.uint8),
    ]
    lossless_codes.encode(weight, *parts)
    is_damaged = draw.random() < WRONG
    if is_damaged:
        draw.choice(parts).view(torch.uint8).flatten()[:: draw.choice((1, 7))] = draw.randrange(256)
    x, ids = tensor(draw, 2, H, dtype=torch.bfloat16), torch.tensor([0, draw.choice((7, 7, 8, -1, 2**62))])
    found = lossless_codes.lossless_linear(x, *parts, tensor(draw, 8) if draw.random() < 0.5 else None)
    rows = by_torch(lossless_codes.lossless_rows, ids, *parts, in_features := count(draw, H))
    if is_damaged or in_features != H or weight.shape[1] != H:  # another width may need as many blocks
        return
    out = torch.empty(8, H, dtype=torch.bfloat16)
    lossless_codes.decode(*parts, (8, H), out)
    assert torch.equal(out.view(torch.int16), weight.view(torch.int16))
    assert torch.equal(rows, weight[ids])
    if found is None:
        raise ValueError("not the kernel's")


def matrix(draw):
    expert = draw.choice(EXPERTS[: len(FORMS)])
    tensors, shape = dict(expert.tensors), expert.shapes["down_proj"]
    part = draw.choice([name for name in tensors if name.startswith("down_proj")])
    if draw.random() < 3 * WRONG:
        tensors[part] = tensor(draw, *tensors[part].shape, dtype=tensors[part].dtype)
    if tensors[part] is None:
        del tensors[part]
    kernel = cpu.LinearKernel(tensors, "down_proj", expert.spec, (count(draw, shape[0]), count(draw, shape[1])))
    x, out, bits = tensor(draw, 2, shape[1]), tensor(draw, 2, shape[0]), count(draw, 0)
    kernel(x, out, activation_bits=bits)
    if tensors[part] is expert.tensors[part] and not bits:
        near(out, x.double() @ expert.weight("down_proj").T)


def record(draw):
    """A record of a damaged file: no kernel, or one that stays within the record's bytes."""
    expert = draw.choice(EXPERTS)
    specs, at = list(expert.record.tensors), draw.randrange(len(expert.record.tensors))
    name, dtype, shape, offset = specs[at]
    change = draw.choice(("offset", "shape", "dtype", "gone", "short", "matrix"))
    if change == "offset":
        offset = draw.choice((-1, -64, 2**40, expert.record.num_bytes, expert.record.num_bytes - 1))
    if change == "shape":
        shape = draw.choice(((0, 0), (1, 1), shape[::-1], (-1, shape[0]), (2**31, 2), (shape[0] * 2, *shape[1:])))
    specs[at] = TensorSpec(name, draw.choice(("F32", "U8", "F16")) if change == "dtype" else dtype, shape, offset)
    if change == "gone":
        del specs[at]
    changed = expert.record._replace(tensors=tuple(specs))
    if change == "short":
        changed = changed._replace(num_bytes=changed.num_bytes // 2)
    if change == "matrix" and changed.matrices:
        wrong = draw.choice(((64, 2**31), (-1, H), (0, 0), (2 * H, 2 * H)))
        changed = changed._replace(matrices=tuple(one._replace(shape=wrong) for one in changed.matrices))
    kernel = ExpertKernel.build(changed, expert.activation, is_transposed=False)
    if kernel is None:
        raise ValueError("no kernel")
    cpu.run_experts(torch.randn(1, H), [kernel], [expert.address], [0, 1], [0], [0], torch.empty(1, H))


def read(draw):
    cpu.read(tensor(draw, 64, 64))


def replay(draw):
    shape = [draw.choice(SIZES) if draw.random() < WRONG / 4 else size for size in (6, 2, 3)]
    routes = np.random.default_rng(draw.randrange(99)).integers(-1, 9, shape).astype(draw.choice((np.int16, np.int64)))
    routes = routes.astype(float) if draw.random() < WRONG else routes.reshape(-1) if draw.random() < WRONG else routes
    if draw.random() < WRONG and routes.size:
        routes.flat[0] = 2**15 - 1
    num_experts, num_slots, starts = count(draw, 8), count(draw, draw.choice((3, 5, 40))), numbers(draw, [0, 2, 6])
    policy, options = (
        draw.choice(demand.REPLAY_POLICIES),
        {"warm": draw.random() < 0.5, "seed": draw.choice((0, -1, 2**70))},
    )
    found = demand.replay(routes, num_experts, starts, num_slots, policy, per_layer=draw.random() < 0.3, **options)
    assert 0 <= found.hits <= found.accesses
    if found.layer_hits.size and num_slots == 5:
        ordered, fixed = demand._in_order(routes, num_experts), {"num_fixed": num_slots - routes.shape[2] - 1}
        again = replay_loop(ordered, num_experts, np.array(starts), num_slots, policy, **fixed, **options)
        assert found.accesses == again[1].sum()


def regroup(draw):
    num_tokens, groups = draw.choice((0, 1, 2, 9)), count(draw, draw.choice((1, 2)))
    routes = np.random.default_rng(draw.randrange(99)).random((num_tokens, draw.choice((0, 2)), 9)) < 0.3
    routes = draw.choice((routes.reshape(-1), routes * 1, routes.tolist(), None)) if draw.random() < WRONG else routes
    start = None if draw.random() < 0.6 else numbers(draw, [row % 2 for row in range(num_tokens)])
    search = Search(routes, groups, start=start, seed=draw.choice((0, -1, 2**70)))
    before = active_pairs(routes, search.group)
    if draw.random() < WRONG:
        name = draw.choice(("routes", "group", "any", "one", "count", "best"))
        setattr(search, name, draw.choice((getattr(search, name)[1:], getattr(search, name).astype(np.int8), None)))
    change = search.run(draw.choice((0, 300, -5)))
    assert active_pairs(routes, search.best) - before == change <= 0


def split(draw):
    shape = [draw.choice((0, 1, 3)) if draw.random() < WRONG else size for size in (6, 2, 4)]
    routes = np.random.default_rng(draw.randrange(99)).random(shape) < 0.4
    routes = draw.choice((routes.reshape(-1), routes * 1, routes.tolist(), None)) if draw.random() < WRONG else routes
    groups, _ = best_split(routes, num_steps=draw.choice((0, -1, 5, 1000)))
    assert set(groups.tolist()) <= {0, 1}


def anneal(draw):
    number = draw.randrange(len(TABLES))
    if draw.random() < WRONG:
        Tables(TABLES[number].problem, tensor(draw, len(TABLES[number].weights)))
    tables, plan = copy(TABLES[number]), PLANS[draw.randrange(len(PLANS)) if draw.random() < 2 * WRONG else number]
    annealing = Annealing(tables, plan, draw.choice((0, -1, 2**70)))
    if draw.random() < WRONG:
        name = draw.choice(("copy_expert", "holds", "used", "busy_s", "flow", "pull_s"))
        setattr(annealing, name, draw.choice((getattr(annealing, name)[:1], getattr(annealing, name).T, None)))
    elif draw.random() < WRONG:
        name = draw.choice(("tokens", "active", "distance", "slots", "transitions", "traffic"))
        setattr(tables, name, draw.choice((getattr(tables, name)[1:], getattr(tables, name).astype(np.float32))))
    annealing.run(draw.choice((0, 30, -5, 1.5, None)), draw.choice((0.0, 1e-3, float("nan"), float("inf"))))
    if draw.random() < 0.1:
        annealing.check_integrity()


ENTRIES = (
    experts, token, layer, combine, linear, module, norm, matrix, lossless, record, read, replay, regroup, split,
    anneal,
)  # fmt: skip
FORMS = ("float32", "bfloat16", "int8", "int4-g32", "mxfp4", "fp8")
EXPERTS = [Expert(seed, form, (H, INNER)) for seed, form in enumerate(FORMS)]
EXPERTS.append(both(8, (H, INNER), spare=2)[1])
KERNELS = [Expert(9, "float32", shape).kernel for shape in ((H, INNER + 1), (H + 1, INNER), (2000, 8))]
TABLES = [Tables(random_problem(seed), slowest=seed % 2 == 0) for seed in range(12)]
PLANS = [random_placement(tables.problem).plan for tables in TABLES]


def main() -> None:
    draw, refused, computed = random.Random(int(sys.argv[2])), Counter(), Counter()
    torch.manual_seed(0)
    with torch.no_grad(), np.errstate(all="ignore"):
        for number in range(int(sys.argv[1])):
            entry = ENTRIES[number % len(ENTRIES)]
            if number % 100 == 0:
                torch.set_num_threads(1 + number % 1000 // 900)
            try:
                entry(draw)
                computed[entry.__name__] += 1
            except REFUSALS as error:
                if "--show" in sys.argv:
                    print(entry.__name__, type(error).__name__, str(error)[:200])
                refused[entry.__name__] += 1
    print(*(f"{entry.__name__}:{refused[entry.__name__]}:{computed[entry.__name__]}" for entry in ENTRIES))


if __name__ == "__main__":
    main()
