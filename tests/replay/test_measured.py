"""Files of measured hit rates: what they may hold, and how a malformed one is refused."""

import json

import pytest

from moeflow.errors import ConfigError
from moeflow.replay.measured import read_realised

MEASURED = {
    "rows": [{"policy": "forecast", "residency": 25, "hit_rate": 0.5}],
    "recall_by_distance": {"markov": {"1": 0.6, "2": 0.5}},
    "wasted_bytes": {"forecast": 2048},
    "timeliness": 0.75,
}


def test_measured_values_without_a_name_stand_for_all(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"recall_by_distance": {"1": 0.5}, "wasted_bytes": 7}))
    realised = read_realised(path)
    assert realised.recall_by_distance == {"all": {"1": 0.5}}
    assert realised.wasted_bytes == {"all": 7}
    path.write_text(json.dumps(MEASURED["rows"]), encoding="utf-8-sig")
    assert read_realised(path).rows == MEASURED["rows"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "holds a int"),
        ('{"rows": 3}', "rows of .* is a int"),
        ('[{"policy": "a", "residency": 15, "hit_rate": 1.5}]', "row 0 of"),
        ('[{"policy": "a", "residency": 15, "hit_rate": NaN}]', "row 0 of"),
        ('[{"policy": "a", "residency": 15, "hit_rate": -0.5}]', "row 0 of"),
        ('[{"policy": "a", "residency": 15}]', "row 0 of"),
        ('{"recall_by_distance": 3}', "recall_by_distance in .* is a int"),
        ('{"recall_by_distance": {"a": {"near": 0.5}}}', "recall_by_distance of 'a'"),
        ('{"wasted_bytes": {"a": "much"}}', "wasted_bytes in"),
        ('{"timeliness": 2}', "timeliness in"),
    ],
)
def test_malformed_measurements_are_named(tmp_path, content, words):
    path = tmp_path / "m.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_realised(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_realised(tmp_path / "none.json")
