"""Pinned slots: registered in pieces, with less where the system refuses, and one warning."""

import logging
from contextlib import closing

import pytest
import torch

from helpers.expert_runtimes import ThreadStreams, build, empty_device, fetch
from helpers.two_cards import TwoCards
from moeflow.core import ExpertKey
from moeflow.errors import ExpertReadError
from moeflow.offload import host_tier
from moeflow.offload.host_tier import CudaRegistrar, PinnedPool

STRIDE = 4096


class Limit:
    """Pins in name only, up to a limit; `largest` is the largest piece it takes."""

    def __init__(self, num_bytes, largest=1 << 60):
        self.left, self.largest, self.pieces, self.refusals = num_bytes, largest, {}, 0

    def register(self, address, num_bytes):
        assert not any(begin < address + num_bytes and address < begin + size for begin, size in self.pieces.items())
        if num_bytes > min(self.left, self.largest):
            self.refusals += 1
            return "CUDA error 2"
        self.left -= num_bytes
        self.pieces[address] = num_bytes
        return None

    def unregister(self, address):
        self.left += self.pieces.pop(address)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_tier, "_PIECE_BYTES", 8 * STRIDE + 100)


@pytest.mark.parametrize(
    ("limit", "largest", "slots", "pinned"),
    [
        (100, 100, 20, 20),
        (13, 100, 13, 13),  # 8, then 4, then 1
        (100, 3, 20, 20),  # never more than three slots at once
        (2, 100, 4, 2),  # below the least: two more, not pinned
        (0, 100, 4, 0),
    ],
)
def test_what_is_refused_is_asked_for_in_halves_and_the_model_goes_on_with_less(caplog, limit, largest, slots, pinned):
    registrar = Limit(limit * STRIDE, largest * STRIDE)
    with caplog.at_level(logging.WARNING):
        pool = PinnedPool(20, STRIDE, registrar, least_slots=4)
    assert (pool.num_slots, pool.num_pinned, len(pool.tensor), len(pool.bytes)) == (slots, pinned, slots, slots)
    assert pool.num_bytes == slots * STRIDE
    assert sum(registrar.pieces.values()) == pinned * STRIDE
    assert all(size % STRIDE == 0 and size <= 8 * STRIDE for size in registrar.pieces.values())
    assert len(caplog.records) == (pinned < 20)
    assert pinned == 20 or "CUDA error 2" in caplog.text
    pool.tensor[:] = 7
    pool.close()
    pool.close()
    assert not registrar.pieces


def test_an_interrupt_while_pinning_leaves_nothing_pinned():
    registrar = Limit(100 * STRIDE)
    taken = registrar.register

    def register(address, num_bytes):
        if registrar.pieces:
            raise KeyboardInterrupt
        return taken(address, num_bytes)

    registrar.register = register
    with pytest.raises(KeyboardInterrupt):
        PinnedPool(20, STRIDE, registrar, least_slots=4)
    assert not registrar.pieces


def test_a_runtime_runs_on_slots_that_no_system_pins(experts_file):
    path, values = experts_file
    pool = PinnedPool(9, 4000, Limit(0), least_slots=4)
    with build(path, 3, host_slots=4, host_pool=pool) as runtime:
        for layer in range(3):
            fetch(runtime, layer, list(range(6)), values)
        runtime.check_integrity()


class FailingStreams(ThreadStreams):
    """Copies that fail as CUDA's do while `fails`: in the call that queues them."""

    fails = False

    def copy(self, target, source, after, **options):
        if self.fails:
            target[: len(target) // 2] = 255
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines of CUDA's")
        return super().copy(target, source, after, **options)


@pytest.mark.parametrize("on_host", [False, True])
def test_a_copy_that_fails_names_cudas_error_and_leaves_no_expert_in_the_slot(experts_file, on_host):
    path, values = experts_file
    streams = FailingStreams()
    with build(path, 3, host_slots=9, streams=streams) as runtime:
        fetch(runtime, 1, [0, 1], values)
        if on_host:
            fetch(runtime, 0, [2], values)
            empty_device(runtime)
        resident = set(runtime.cache.slots)
        streams.fails = True
        with (
            pytest.raises(
                ExpertReadError,
                match=r"expert 2 of MoE layer 0 .* CUDA error: an illegal memory access was encountered\Z",
            ),
            closing(runtime.fetch(0, [2])) as fetched,
        ):
            list(fetched)
        assert set(runtime.cache.slots) <= resident
        assert ExpertKey(0, 2) not in runtime.cache.slots
        runtime.check_integrity()
        streams.fails = False
        fetch(runtime, 0, [2], values)


def test_cudas_error_is_named_and_taken_by_a_launch_on_its_own_card(monkeypatch):
    cards, calls = TwoCards(monkeypatch), []

    class Runtime:
        @staticmethod
        def cudaHostRegister(address, num_bytes, flags):
            calls.append((cards.current, address, num_bytes))
            return 2 if num_bytes > 10 else 0

        @staticmethod
        def cudaHostUnregister(address):
            calls.append((cards.current, address))

    def ones(count, device):
        calls.append((cards.current, "launch"))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch, "ones", ones)
    registrar = CudaRegistrar(torch.device("cuda", 1))
    assert registrar.register(4096, 10) is None
    assert registrar.register(8192, 11) == "CUDA error 2"
    registrar.unregister(4096)
    assert calls == [(1, 4096, 10), (1, 8192, 11), (1, "launch"), (1, 4096)]
    assert (cards.current, cards.touched) == (0, {1})

    def lost(address):
        calls.append("asked")
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Runtime, "cudaHostUnregister", staticmethod(lost))
    registrar.unregister(4096)
    assert calls[-1] == "asked"
