"""Attention over positions kept in int8 and int4: records have torch's bits, sums are of what they stand for."""

import pytest
import torch

from helpers.cpu_experts import AVAILABLE, needs_library, use
from helpers.kept_attention import KeptAttention
from moeflow.engine.kv_cache.kv_format import FORMATS

pytestmark = needs_library
SHAPES = [  # query heads, heads of keys, features of keys, of values
    (4, 1, 64, 64),
    (9, 3, 64, 64),
    (2, 2, 16, 16),
    (7, 1, 48, 32),
    (10, 2, 128, 80),
    (1, 1, 512, 256),
]


@pytest.fixture(params=AVAILABLE or ["none"])
def forced(request):
    """Each instruction set in turn."""
    use(request.param)
    yield request.param
    use("")


@pytest.fixture(params=FORMATS.values(), ids=lambda form: form.name)
def form(request):
    return request.param


def worst(found, expected):
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SHAPES)
def test_a_step_attends_to_what_the_records_stand_for(forced, form, sizes, dtype):
    step = KeptAttention(form, dtype, sizes, [0, 1, 63, 700])
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-4  # queries are rounded to 16 bits
    assert worst(step.run(), step.decoded().run()) <= rounding


@pytest.mark.parametrize(
    "options", [{"window": 30}, {"chunk": 100}, {"soft_cap": 3.0}, {"sinks": True}, {"window": 65, "sinks": True}]
)
def test_windows_caps_and_sinks_are_those_of_positions_kept_as_they_are(forced, form, options):
    step = KeptAttention(form, torch.float32, (6, 2, 32, 32), [5, 130, 600], **options)
    assert worst(step.run(), step.decoded().run()) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [16, 48, 64, 128])
def test_a_new_position_has_the_bits_that_torch_writes(forced, form, features, dtype):
    step = KeptAttention(form, dtype, (8, 8, features, features), [3] * 6)
    keys, values = step.new
    keys[0] = 0
    keys[5] = -0.0
    keys[1, :, :, 1::3] = 0
    keys[2] *= 1e-6  # scales that float16 rounds off
    keys[3] *= 3e4
    values[0, :, :, 0] = torch.inf
    values[1, :, :, 5] = torch.nan
    values[2] = torch.linspace(-1, 1, features)  # halves between codes
    values[3] = torch.arange(features) % 15 - 7.0
    step.run()
    for kept, both in ((0, keys), (1, values)):
        found = torch.stack([memory[kept][:, 3] for memory in step.memory])
        assert torch.equal(found, step.sides[kept].encode(both[:, :, 0]))
    written = [memory[0][:, 4:] for memory in step.memory]
    assert not any(one.any() for one in written), "nothing is written behind it"


def test_bits_are_the_same_for_any_threads_and_in_any_row(forced, form):
    step = KeptAttention(form, torch.bfloat16, (16, 4, 64, 64), [2000, 1500, 10])
    alone = step.run()
    assert torch.equal(step.run(2), alone)
    lone = KeptAttention.__new__(KeptAttention)
    vars(lone).update(vars(step), lengths=step.lengths[1:2], memory=step.memory[1:2], query=step.query[1:2])
    lone.new = [one[1:2] for one in step.new]
    assert torch.equal(lone.run(), alone[1:2])


def test_a_number_that_is_none_is_seen_in_the_answer(forced, form):
    for side in (0, 1):
        step = KeptAttention(form, torch.float32, (2, 1, 32, 32), [40])
        step.olds[0][side][0, 7, 3] = torch.nan
        step.room()
        assert step.run().isnan().all() if side == 0 else step.run().isnan().any()
    step = KeptAttention(form, torch.float32, (2, 1, 32, 32), [40])
    step.query[0, 1, 0, 5] = torch.inf
    found = step.run()
    assert found[0, 0, 1].isnan().all()
    assert not found[0, 0, 0].isnan().any()
