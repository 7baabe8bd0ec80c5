"""A plan is written with its checksum, and read only as it was written."""

import json

import pytest

from helpers.plans import small_plan
from moeflow.errors import ConfigError
from moeflow.fit.plan import Plan


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = small_plan()
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.total_bytes == sum(plan.lines.values())


def test_a_plan_that_was_edited_by_hand_is_refused(tmp_path):
    text = small_plan().to_json()
    assert '"experts": 200000' in text
    (tmp_path / "plan").write_text(text.replace('"experts": 200000', '"experts": 900000'))
    with pytest.raises(ConfigError, match=r"plan was changed since it was written.*moeflow fit MODEL -o PLAN"):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b'{"plan": 1, "crc32": ""}', b'{"plan": {}}', b"[" * 5000]
)
def test_a_file_that_is_no_plan_is_named(content, tmp_path):
    (tmp_path / "plan").write_bytes(content)
    with pytest.raises(ConfigError, match=r"plan is no plan|plan has format None"):
        Plan.load(tmp_path / "plan")


def test_a_plan_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere cannot be read: No such file"):
        Plan.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lines": {"dense": 1}}, "other lines than dense, experts"),
        ({"lines": small_plan().lines | {"experts": -1}}, "experts is -1"),
        ({"context": 1.5}, "context is 1.5"),
        ({"options": []}, "must be objects"),
        ({"format": 2}, "has format 2, this moeflow reads 1"),
    ],
)
def test_a_malformed_field_is_named(change, error):
    from dataclasses import replace

    with pytest.raises(ConfigError, match=error):
        Plan.from_json(replace(small_plan(), **change).to_json())


def test_a_field_that_is_missing_is_named():
    found = json.loads(small_plan().to_json())["plan"]
    del found["stored"]
    from moeflow.atomic_file import NO_CHECKSUM, seal

    with pytest.raises(ConfigError, match="stored"):
        Plan.from_json(seal(json.dumps({"crc32": NO_CHECKSUM, "plan": found}).encode()))
