"""The model of a pass's time, held against the replay of routes over a link, and against bounds."""

import math

import numpy as np
import pytest

from helpers.fit_models import small_sizes
from helpers.machine_profiles import MISS_S, small_profile
from helpers.small_traces import E, K, L, make_trace
from moeflow.fit.sizes import ModelSizes
from moeflow.fit.speed import Load, SpeedModel, union
from moeflow.replay.link import LinkModel
from moeflow.replay.machine import replay_machine

_EXPERT_BYTES = 3 * 2 * 64 * 4096
_FAST = 1e30


def sizes_for(*, dense: int = 0) -> ModelSizes:
    """The model of the traces: its experts are three matrices [64, 4096] in bfloat16."""
    return small_sizes(layers=L, experts=E, top_k=K, dense=dense, values=0)


def model(sizes: ModelSizes | None = None, **figures) -> SpeedModel:
    """A model on a machine on which only what is given takes time."""
    free = {
        "kernel_read": {"bf16": {1: _FAST}}, "kernel_flops": {"bf16": _FAST}, "dense_read": _FAST,
        "dense_flops": _FAST, "layer_s": {"native": 1e-12, "python": 1e-12, "missing": MISS_S},
        "step_s": {"native": 1e-12, "python": 1e-12},
        "disk_read": {1: _FAST}, "disk_read_alone": {1: _FAST}, "memory_read": {1: _FAST},
        "memory_touch": _FAST, "first_check": {"checksum": _FAST},
    }  # fmt: skip
    sizes = sizes or sizes_for()
    return SpeedModel(sizes, sizes.published, small_profile(**free | figures))


@pytest.mark.parametrize("residency", [25, 50, 75])
def test_the_time_of_misses_is_that_of_the_replay_over_a_link(residency):
    trace = make_trace(40)
    layer_s, bytes_per_s = 2e-3, 1e9
    link = LinkModel(_EXPERT_BYTES, bytes_per_s, layer_s)
    replayed = replay_machine(trace, residency, "lru", link)
    rate = {1: bytes_per_s}
    made = model(
        layer_s={"native": layer_s, "python": layer_s, "missing": MISS_S}, disk_read=rate, disk_read_alone=rate
    )
    fixed_s = misses_s(L, K, replayed["hit_rate"])
    assert made.decode_s(replayed["hit_rate"]) - fixed_s == pytest.approx(1 / replayed["tokens_per_s"], rel=1e-6)


def misses_s(layers: int, top_k: int, hit_rate: float) -> float:
    """The runtime's own time for experts that are missed, which a replay leaves out."""
    return layers * top_k * (1 - hit_rate) * MISS_S


def test_reads_of_a_layer_hide_behind_the_experts_that_are_there():
    slow_kernel = {"bf16": {1: _EXPERT_BYTES / 1e-2}}  # 10 ms an expert
    rate = {1: _EXPERT_BYTES / 1e-3}  # 1 ms a read
    made = model(kernel_read=slow_kernel, disk_read=rate, disk_read_alone=rate)
    load = Load(2, 1e-2, _EXPERT_BYTES, 1)
    assert made.layer_s(load, 1.0) == pytest.approx(2e-2)
    assert made.layer_s(load, 0.0) == pytest.approx(2e-2 + 2 * MISS_S)  # 2 ms of reads, under 20 ms of computing
    fast = Load(2, 1e-4, _EXPERT_BYTES, 1)
    assert made.layer_s(fast, 0.0) == pytest.approx(2e-3 + 1e-4 + 2 * MISS_S)  # the last is computed after its read


def test_misses_of_a_layer_are_distributed_and_not_only_averaged():
    rate = {1: _EXPERT_BYTES / 1e-3}
    made, load = model(disk_read=rate, disk_read_alone=rate), Load(4, 1e-4, _EXPERT_BYTES, 1)
    rng = np.random.default_rng(0)
    misses = (rng.random((200_000, 4)) > 0.7).sum(1)
    times = [made.layer_s(load._replace(num_experts=4), 1.0)] + [
        max(4e-4, count * 1e-3 + 1e-4) + count * MISS_S for count in range(1, 5)
    ]
    assert made.layer_s(load, 0.7) == pytest.approx(np.array(times)[misses].mean(), rel=5e-3)


def test_a_step_reads_every_dense_byte_once():
    made = model(sizes_for(dense=10**9), dense_read=1e9)
    assert made.decode_s(1.0) == pytest.approx(1.0, rel=1e-3)


def test_more_residency_is_never_slower_and_a_faster_disk_neither():
    made = model(disk_read={1: 1e9}, disk_read_alone={1: 1e9}, kernel_read={"bf16": {1: 1e10}})
    times = [made.decode_s(rate / 10) for rate in range(11)]
    assert times == sorted(times, reverse=True)
    faster = model(disk_read={1: 2e9}, disk_read_alone={1: 2e9}, kernel_read={"bf16": {1: 1e10}})
    assert faster.decode_s(0.5) < made.decode_s(0.5)


def test_a_first_prompt_reads_each_expert_that_it_demands_once():
    made = model(disk_read={1: 1e9}, disk_read_alone={1: 1e9})
    assert made.prefill_s(10_000) == pytest.approx(L * E * (_EXPERT_BYTES / 1e9 + MISS_S), rel=1e-3)
    assert union(E, K, 10_000) == pytest.approx(E)
    assert union(E, K, 1) == pytest.approx(K)


def test_a_long_prompt_is_bound_by_arithmetic():
    made = model(kernel_flops={"bf16": 1e12})
    flops = 2 * 5000 * L * K * 3 * 64 * 4096
    assert made.prefill_s(5000) == pytest.approx(flops / 1e12 + L * E * MISS_S, rel=1e-2)


def test_many_sequences_share_the_experts_that_they_demand():
    made = model(disk_read={1: 1e9}, disk_read_alone={1: 1e9})
    assert made.decode_s(0.0, batch=64) < 64 * made.decode_s(0.0) / 10
    low, mid, high = made.decode_tok_s((0.2, 0.5, 0.8), batch=2)
    assert low < mid < high
    assert not math.isnan(mid)
