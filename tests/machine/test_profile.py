"""Profiles of machines: JSON both ways, and what is refused."""

import json
import math

import pytest

from helpers.machine_profiles import small_profile
from moeflow.errors import ConfigError
from moeflow.machine.profile import MachineProfile


def test_json_gives_the_same_profile_back():
    profile = small_profile()
    assert MachineProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("dense_read", 0),
        ("dense_read", -1.0),
        ("dense_flops", math.nan),
        ("dense_flops", math.inf),
        ("dense_read", True),
        ("threads", 1.5),
        ("memory_read", {"many": 1.0}),
        ("memory_read", [1.0]),
        ("disk_read", {"4096": "fast"}),
        ("kernel_read", {"bf16": 3.0}),
        ("layer_s", {"native": None}),
        ("hardware", None),
        ("format", 1),
    ],
)
def test_a_figure_that_is_no_figure_is_refused(figure, value):
    found = {**small_profile().to_dict(), figure: value}
    with pytest.raises(ConfigError, match="moeflow doctor --measure"):
        MachineProfile.from_dict(found)


def test_a_figure_that_is_missing_or_unknown_is_named():
    found = small_profile().to_dict()
    del found["dense_read"]
    with pytest.raises(ConfigError, match="dense_read"):
        MachineProfile.from_dict(found)
    with pytest.raises(ConfigError, match="sparse_read"):
        MachineProfile.from_dict({**small_profile().to_dict(), "sparse_read": 1.0})
    with pytest.raises(ConfigError, match="no profile"):
        MachineProfile.from_dict([])
