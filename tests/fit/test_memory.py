"""Lines of memory, and the division that loading follows."""

import pytest

from helpers.fit_models import small_sizes
from moeflow.fit.formats import other_formats
from moeflow.fit.memory import (
    LINES,
    MOST_STEP_TOKENS,
    PROCESS_BYTES,
    READ_THREADS,
    auto_budget,
    memory_lines,
    most_expert_bytes,
    staging_bytes,
    usable,
)


def test_every_line_is_there_and_the_most_experts_fill_what_is_usable():
    sizes = small_sizes()
    lines = memory_lines(sizes, sizes.published, 0, context=128)
    assert tuple(lines) == LINES
    most = most_expert_bytes(lines, 2 * 10**9)
    whole = memory_lines(sizes, sizes.published, most, context=128)
    assert sum(whole.values()) == usable(2 * 10**9) < 2 * 10**9


def test_keys_and_values_grow_with_context_and_batch_and_nothing_else_does_with_the_batch():
    sizes = small_sizes()
    one, two = (memory_lines(sizes, sizes.published, 0, context=1024, batch=batch) for batch in (1, 2))
    assert two["key_values"] == 2 * one["key_values"] > 0
    longer = memory_lines(sizes, sizes.published, 0, context=2048)
    assert longer["key_values"] == 2 * one["key_values"]
    assert longer["activations"] > one["activations"]
    assert two["activations"] < one["activations"]  # an engine of several sequences runs prompts in pieces
    assert MOST_STEP_TOKENS < 1024


def test_a_measured_process_takes_the_place_of_the_constant_where_it_is_larger():
    sizes = small_sizes()
    measured = [
        memory_lines(sizes, sizes.published, 0, context=8, process_bytes=size)["process"] for size in (0, 123, 10**10)
    ]
    assert measured == [PROCESS_BYTES, PROCESS_BYTES, 10**10]


def test_lossless_experts_shrink_dense_weights_too():
    sizes = small_sizes()
    lossless = next(form for form in other_formats(sizes.published) if form.name == "lossless")
    assert sizes.dense_in_memory(lossless) < sizes.dense_in_memory(sizes.published) == sizes.dense_bytes


@pytest.mark.parametrize("free", [0, 10**9, 10**12])
def test_auto_keeps_a_reserve_and_takes_no_more_than_all(free):
    budget, reserved = auto_budget(free, slot_bytes=10**6, all_bytes=5 * 10**9, key_value_bytes=10**7)
    assert 0 <= budget <= min(max(free - reserved, 0), 5 * 10**9)
    assert reserved > READ_THREADS * 10**6 + 10**7
    assert staging_bytes(10**6) == READ_THREADS * (2 << 20)
