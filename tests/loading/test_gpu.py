"""A GPU's memory while a model is loaded: measured, divided, the same at every load, and the engine's part of it."""

import importlib

import pytest
import torch

from helpers.counted_card import CountedCard
from helpers.small_models import tiny_mixtral
from moeflow import Engine, load_moe
from moeflow.core import LayerLayout, RecordLayout
from moeflow.errors import BudgetError
from moeflow.loading import tiers
from moeflow.loading.budget import ExpertsSize
from moeflow.loading.gpu import Gpu
from moeflow.loading.gpu_memory import GpuMemory
from moeflow.loading.options import LoadOptions
from moeflow.loading.warm_up import WarmUp

GIB, MIB = 1 << 30, 1 << 20
LAYOUT = LayerLayout(
    "layers.0",
    128,
    RecordLayout.pack([("gate_up_proj", "BF16", (1536, 2048)), ("down_proj", "BF16", (2048, 768))]),
)
SIZE = ExpertsSize.of([LAYOUT] * 48, 8, whole_slots=True)
MEASURED = WarmUp(4096, 700 * MIB)


def options(**given):
    return LoadOptions(device="cpu", **given)


@pytest.fixture
def card(monkeypatch):
    return CountedCard(monkeypatch, 12 * GIB, 3 * GIB)


def divide(card, warmed=MEASURED, key_value_bytes=GIB, size=SIZE, **given):
    return Gpu(GpuMemory(card.device), warmed, key_value_bytes).divide(size, LAYOUT, options(**given))


def total(plan):
    return plan.expert_bytes + plan.reserved_bytes


def test_experts_get_what_the_measured_pass_leaves(card):
    small, large = (divide(card, WarmUp(4096, peak)) for peak in (100 * MIB, 1100 * MIB))
    assert (small.activation_bytes, large.activation_bytes) == (100 * MIB, 1100 * MIB)
    assert abs(small.expert_bytes - large.expert_bytes - 1000 * MIB) < SIZE.slot_bytes
    assert 9 * GIB - SIZE.slot_bytes < total(small) <= 9 * GIB


def test_a_pass_that_failed_leaves_the_estimate_and_says_so(card):
    gpu = Gpu(GpuMemory(card.device), WarmUp(4096, None, "ValueError: no pixels"), GIB)
    plan = gpu.divide(SIZE, LAYOUT, options())
    assert plan.activation_bytes == 192 * MIB
    assert gpu.describe(plan)["activations"] == "estimated, since a first pass failed: ValueError: no pixels"
    assert Gpu(GpuMemory(card.device), MEASURED, GIB).describe(plan)["activations"] == "measured"


def test_keys_and_values_get_the_rest_where_all_experts_fit(card):
    few = ExpertsSize.of([LAYOUT] * 4, 8, whole_slots=True)
    plan = divide(card, size=few)
    assert plan.expert_bytes == few.all_bytes
    assert plan.key_value_bytes > 2 * GIB
    assert total(plan) == 9 * GIB
    assert divide(card, size=few, kv_memory="1GiB").key_value_bytes == GIB


def test_experts_of_the_users_size_leave_keys_and_values_what_is_there(card):
    plan = divide(card, expert_memory=4 * GIB)
    assert 4 * GIB - SIZE.slot_bytes < plan.expert_bytes <= 4 * GIB
    assert total(plan) == 9 * GIB
    tight = divide(card, expert_memory=7 * GIB)
    assert 0 < tight.key_value_bytes < GIB
    assert total(tight) <= 9 * GIB
    assert divide(card, expert_memory=10 * GIB).key_value_bytes == 0


def test_two_sizes_of_the_users_that_do_not_fit_together_are_refused(card):
    with pytest.raises(BudgetError, match=r"kv_memory of 2,147,483,648 bytes and expert_memory of .*Give less to one"):
        divide(card, key_value_bytes=2 * GIB, expert_memory=7 * GIB, kv_memory="2GiB")
    with pytest.raises(BudgetError, match=r"give a smaller kv_memory"):
        divide(card, key_value_bytes=9 * GIB, kv_memory="9GiB")


@pytest.mark.parametrize(("kv_memory", "context", "wanted"), [("auto", 256, 4096 * 768), (100 * 768, 100, 100 * 768)])
def test_the_first_pass_is_as_long_as_the_context_that_is_kept(card, kv_memory, context, wanted):
    with card:
        gpu = Gpu.of(tiny_mixtral(), GpuMemory(card.device), options(kv_memory=kv_memory), 768)
    assert (gpu.warmed.context, gpu.key_value_bytes) == (context, wanted)
    assert gpu.warmed.peak_bytes > 0


def test_a_family_that_does_not_tell_its_keys_and_values_has_room_for_some(card):
    with card:
        gpu = Gpu.of(tiny_mixtral(), GpuMemory(card.device), options(), 0)
    assert gpu.key_value_bytes == 256 * MIB


@pytest.mark.parametrize("is_fragmented", [False, True])
def test_load_close_load_gives_the_same_budget(card, is_fragmented):
    model, budgets, card.is_fragmented = tiny_mixtral(), [], is_fragmented
    with card:
        for _ in range(2):
            plan = Gpu.of(model, GpuMemory(card.device), options(), 98_304).divide(SIZE, LAYOUT, options())
            arena = torch.empty(plan.expert_bytes, dtype=torch.uint8)
            del arena  # the allocator keeps it
            assert card.kept > 7 * GIB
            budgets.append(plan)
    assert budgets[0] == budgets[1]
    assert card.cards.touched == {1}


def load_planned(monkeypatch, folder, gpu, **given):
    """Load on the CPU what is planned for a GPU."""
    module = importlib.import_module("moeflow.loading.load_moe")
    build = tiers.build_runtime
    monkeypatch.setattr(module, "build_runtime", lambda *args, **kwargs: build(*args, **{**kwargs, "gpu": gpu}))
    return load_moe(folder, device="cpu", predictor=None, step="python", **given)


def test_the_engine_takes_what_was_planned_for_keys_and_values(monkeypatch, mixtral_folder, card):
    card.other_bytes = card.num_bytes - 4 * MIB
    model = load_planned(monkeypatch, mixtral_folder, Gpu(GpuMemory(card.device), WarmUp(256, MIB), MIB))
    with model.moeflow, Engine(model) as engine:
        plan = model.moeflow.stats()["plan"]
        lines = {"expert_bytes", "key_value_bytes", "activation_bytes", "prefill_bytes", "slack_bytes"}
        assert set(plan) == lines | {"context", "activations"}
        assert sum(plan[line] for line in lines) <= 4 * MIB
        assert engine.stats()["kv_budget_bytes"] == plan["key_value_bytes"] == MIB
        assert model.moeflow.most_tokens == 256
        done = engine.generate([[5] * 8, [7] * 2000])
        assert [one.finish_reason == "error" for one in done] == [False, True]
        assert Engine(model, kv_memory=10_000).stats()["kv_budget_bytes"] == 10_000


def test_on_the_cpu_the_engine_takes_the_kv_memory_of_loading(mixtral_folder):
    with load_moe(mixtral_folder, device="cpu", kv_memory="1MB").moeflow as runtime:
        assert runtime.stats()["plan"] == {"key_value_bytes": 1_000_000}
    model = load_moe(mixtral_folder, device="cpu", kv_memory="1MB")
    with model.moeflow, Engine(model) as engine:
        assert engine.stats()["kv_budget_bytes"] == 1_000_000


def test_on_the_cpu_experts_leave_what_is_kept_for_keys_and_values(mixtral_folder):
    with pytest.raises(BudgetError, match="are kept for activations and the key-value cache"):
        load_moe(mixtral_folder, device="cpu", kv_memory="900TiB")


class Registrar:
    def __init__(self, device):
        pass

    def register(self, address, num_bytes):
        return None

    def unregister(self, address):
        return None


@pytest.mark.parametrize(("num_slots", "least", "most"), [(24, 8, 8), (23, 9, 24)])
def test_only_a_ring_is_pinned_where_every_expert_is_on_the_gpu(monkeypatch, num_slots, least, most):
    monkeypatch.setattr(tiers, "CudaRegistrar", Registrar)
    layout = LayerLayout("layers.0", 8, RecordLayout.pack([("w", "F32", (1000,))]))
    size = ExpertsSize.of([layout] * 3, 2, whole_slots=True)
    host = tiers._host_tier(size, options(), "lfru", 3, num_slots)
    assert least <= host.pool.num_slots <= most
    assert host.pool.num_pinned == host.pool.num_slots
    host.pool.close()
