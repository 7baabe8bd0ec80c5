"""Records of keys and values: how far they are off, that each is of its own position, and which formats there are."""

import pytest
import torch

from moeflow.engine.kv_cache.kv_format import FORMATS, check_features, format_named
from moeflow.errors import ConfigError

GROUP = 32


@pytest.fixture(params=[FORMATS["int8"].key, FORMATS["int4"].value], ids=lambda form: f"{form.bits} bits")
def form(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [16, 64, 80])
def test_a_number_is_half_a_scale_off_at_most_or_a_whole_one_at_the_end(form, features, dtype):
    x = (torch.randn(2, 3, 50, features) * torch.logspace(-2, 2, features)).to(dtype)
    found = form.decode(form.encode(x), features, torch.float32)
    for part, read in zip(x.float().split(GROUP, -1), found.split(GROUP, -1), strict=True):
        highest = part.abs().amax(-1, keepdim=True)
        missed = 1.0 if form.bits == 4 else 0.5  # of 4 bits, there is no code opposite to the end
        allowed = highest / abs(form.end) * missed + highest * 2**-11  # float16 rounds the scale
        assert ((part - read).abs() <= allowed * (1 + 1e-3)).all()


def test_a_record_is_of_its_own_head_and_position(form):
    x = torch.randn(1, 3, 5, 48)
    whole = form.encode(x)
    assert whole.shape == (1, 3, 5, form.record_bytes(48))
    assert torch.equal(whole[:, 1:2, 2:4], form.encode(x[:, 1:2, 2:4]))
    read = form.decode(whole, 48, torch.float32)
    assert torch.equal(read[:, 1:2, 2:4], form.decode(whole[:, 1:2, 2:4], 48, torch.float32))


def test_bytes_that_were_never_written_may_stand_for_zeros(form):
    zeros = torch.zeros(1, 1, 2, form.record_bytes(48), dtype=torch.uint8)
    assert not form.decode(zeros, 48, torch.bfloat16).any()
    assert not form.decode(form.encode(torch.zeros(1, 1, 2, 48)), 48, torch.float32).any()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e30])
def test_what_no_scale_can_hold_is_read_as_nan_and_the_next_group_is_whole(form, broken):
    x = torch.ones(1, 1, 1, 64)
    x[..., 3] = broken
    read = form.decode(form.encode(x), 64, torch.float32)
    assert read[..., :32].isnan().all()
    assert (read[..., 32:] - 1).abs().max() < 1e-3


def test_records_take_the_bytes_that_the_documentation_says():
    features = (16, 64, 80, 128)
    assert [FORMATS["int8"].key.record_bytes(count) for count in features] == [18, 68, 86, 136]
    assert [FORMATS["int4"].value.record_bytes(count) for count in features] == [10, 36, 46, 72]
    assert FORMATS["int4"].key == FORMATS["int8"].value == FORMATS["int8"].key


def test_unknown_formats_and_heads_that_fill_no_groups_are_refused():
    form = FORMATS["int4"]
    assert format_named("auto") is None
    assert format_named(form.name) is form
    with pytest.raises(ConfigError, match=r"kv_format='fp8' is unknown\. Allowed: auto, int8, int4"):
        format_named("fp8")
    with pytest.raises(ConfigError, match="head size 24 is no multiple of 16"):
        check_features(form, 24)
    with pytest.raises(ConfigError, match="head size 528"):
        check_features(form, 528)
