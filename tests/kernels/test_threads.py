"""Threads of a kernel: more of them than cores, from several callers at once, and still every piece once."""

import threading

import pytest
import torch

from helpers.cpu_experts import needs_library
from moeflow.kernels.cpu import ops as cpu

NUM_CALLS = 200


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_library
def test_pieces_are_each_done_once_however_many_threads_share_them(threads):
    x, weight = torch.randn(3, 96), torch.randn(1000, 96)
    threads(1)
    expected = cpu.linear(x, weight, None)
    threads(8)
    for _ in range(NUM_CALLS):
        assert torch.equal(cpu.linear(x, weight, None), expected)


@needs_library
def test_callers_in_several_threads_have_teams_of_their_own(threads):
    threads(4)
    weight = torch.randn(700, 64)
    xs = [torch.randn(2, 64) for _ in range(3)]
    expected = [cpu.linear(x, weight, None) for x in xs]
    wrong = []

    def call(number):
        torch.set_num_threads(4)
        for _ in range(NUM_CALLS):
            if not torch.equal(cpu.linear(xs[number], weight, None), expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(len(xs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
