"""CUDA streams above a driver with two cards: one card alone is touched, and Ctrl-C leaves the caller's stream."""

import threading

import pytest
import torch

from helpers.two_cards import TwoCards, interrupt_at_each_line
from moeflow.offload import streams as streams_module
from moeflow.offload.streams import CudaStreams

SECOND = torch.device("cuda", 1)


@pytest.fixture
def cards(monkeypatch):
    return TwoCards(monkeypatch)


def use(streams):
    source, target = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    end = streams.copy(target, source, streams.compute_event())
    streams.wait(end)
    assert streams.done(streams.copy(target, source, end))
    assert torch.equal(source, target)


def test_the_second_card_is_used_without_a_context_on_the_first(cards):
    streams = CudaStreams(SECOND)
    for _ in range(2):
        use(streams)
    thread = threading.Thread(target=use, args=(streams,))
    thread.start()
    thread.join()
    streams.finish()
    assert cards.touched == {1}
    assert cards.current == 0


def test_a_stream_guard_of_torch_would_touch_the_first_card(cards):
    """What `CudaStreams` must not do; the stand-in sees it."""
    stream = torch.cuda.Stream(SECOND)
    cards.set_stream(stream)
    cards.set_stream(cards.current_stream(torch.device("cuda", 0)))
    assert cards.touched == {0, 1}


def test_ctrl_c_at_any_line_of_a_copy_leaves_the_callers_stream_current(cards):
    streams = CudaStreams(SECOND)
    own = torch.cuda.Stream(SECOND)
    with torch.cuda.device(SECOND):
        cards.set_stream(own)
        struck = 0
        for _ in interrupt_at_each_line(lambda: use(streams), {streams_module.__file__}):
            struck += 1
            streams.compute_event()
            assert cards.current_stream(SECOND) is own
        assert struck > 20
        assert cards.current == 1
