"""Topology files: units, both ways to say bandwidth, and every malformed file refused by the name of what is wrong."""

import json
import sys

import numpy as np
import pytest

from moeflow.errors import PlacementError
from moeflow.placement.files.topology import load_topology, read_topology

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

GPU = {"memory": "24GB", "tflops": 120, "memory_gb_per_s": 900.5}
LINKS = {"within_node_gb_per_s": 20, "between_nodes_gb_per_s": 5}
TOML = """
name = "mixed"
[[gpus]]
name = "RTX 4090"
count = 2
memory = "24GB"
tflops = 120
memory_gb_per_s = 900
[[gpus]]
memory = "11.5GiB"
tflops = 25.5
memory_gb_per_s = 360
node = 1
[links]
within_node_gb_per_s = 20
between_nodes_gb_per_s = 2.5
"""


def write(folder, content, name="t.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def test_toml_and_json_say_the_same_machine(tmp_path):
    toml = read_topology(write(tmp_path, TOML, "t.toml"))
    other = read_topology(write(tmp_path, tomllib.loads(TOML)))
    assert toml.gpus == other.gpus
    assert (toml.name, toml.num_gpus, toml.nodes) == ("mixed", 3, (0, 0, 1))
    first, last = toml.gpus[0], toml.gpus[2]
    assert (first.memory_bytes, first.flops_per_s, first.memory_bytes_per_s) == (24 * 10**9, 120e12, 900e9)
    assert (last.memory_bytes, last.flops_per_s) == (int(11.5 * 2**30), 25.5e12)
    off_diagonal = ~np.eye(3, dtype=bool)
    expected = np.array([[0, 20, 2.5], [20, 0, 2.5], [2.5, 2.5, 0]]) * 1e9
    np.testing.assert_array_equal(toml.bandwidth_bytes_per_s[off_diagonal], expected[off_diagonal])
    np.testing.assert_array_equal(other.bandwidth_bytes_per_s, toml.bandwidth_bytes_per_s)


def test_a_matrix_gives_each_direction_its_own_bandwidth(tmp_path):
    content = {"gpus": [GPU | {"count": 2}], "bandwidth_gb_per_s": [[0, 3], [4.5, 0]]}
    topology = read_topology(write(tmp_path, content))
    assert (topology.bandwidth_bytes_per_s[0, 1], topology.bandwidth_bytes_per_s[1, 0]) == (3e9, 4.5e9)
    assert topology.name == "t"


def test_one_gpu_needs_no_links(tmp_path):
    assert read_topology(write(tmp_path, {"gpus": [GPU]})).num_gpus == 1


def test_a_topology_is_a_preset_or_a_file(tmp_path):
    path = write(tmp_path, {"gpus": [GPU | {"count": 4}], "links": LINKS})
    assert load_topology(path).num_gpus == load_topology(str(path), 4).num_gpus == 4
    assert load_topology("pcie", 3).name == "pcie"
    for name, num_gpus, told in (
        (path, 2, "describes 4 GPUs, and 2 were asked for"),
        ("nvlink", None, "how many GPUs"),
        ("nvlnk", 4, "neither a file nor known. Known: nvlink, pcie, two-nodes"),
        (tmp_path / "absent.toml", 4, "neither a file nor known"),
    ):
        with pytest.raises(PlacementError, match=told):
            load_topology(name, num_gpus)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ([], "the file is \\[\\]. Give an object"),
        ({}, "lacks 'gpus'"),
        ({"gpus": []}, "gpus is \\[\\]"),
        ({"gpus": [3]}, r"gpus\[0\] is 3"),
        ({"gpu": [GPU]}, "unknown key 'gpu'. Known: name, gpus, links"),
        ({"gpus": [GPU | {"vram": "1GB"}]}, r"gpus\[0\] has the unknown key 'vram'"),
        ({"gpus": [GPU], "links": LINKS | {"nvlink": 1}}, "links has the unknown key 'nvlink'"),
        ({"gpus": [GPU], "links": 20}, "links is 20"),
        ({"gpus": [GPU], "name": 3}, "name is 3"),
        ({"gpus": [{"memory": "1GB", "tflops": 1}]}, "lacks 'memory_gb_per_s'"),
        ({"gpus": [GPU | {"name": "3060", "memory": 24}]}, r"gpus\[0\] \(3060\): memory is 24. .*\"24GB\""),
        ({"gpus": [GPU | {"memory": "50%"}]}, "memory is '50%'"),
        ({"gpus": [GPU | {"memory": "0GB"}]}, "memory is '0GB'. Give a size above 0"),
        ({"gpus": [GPU | {"memory": "24 gigs"}]}, "memory is '24 gigs'"),
        ({"gpus": [GPU | {"tflops": 0}]}, "tflops is 0. Give a number above 0"),
        ({"gpus": [GPU | {"tflops": "120"}]}, "tflops is '120'"),
        ({"gpus": [GPU | {"tflops": True}]}, "tflops is True"),
        ({"gpus": [GPU | {"memory_gb_per_s": -1}]}, "memory_gb_per_s is -1"),
        ('{"gpus": [{"memory": "1GB", "tflops": NaN, "memory_gb_per_s": 1}]}', "tflops is nan"),
        ({"gpus": [GPU | {"count": 0}]}, "count is 0"),
        ({"gpus": [GPU | {"count": 1.5}]}, "count is 1.5"),
        ({"gpus": [GPU | {"node": -1}]}, "node is -1"),
        ({"gpus": [GPU | {"count": 2}]}, "lacks within_node_gb_per_s, and GPUs 0 and 1"),
        (
            {"gpus": [GPU, GPU | {"node": 1}], "links": {"within_node_gb_per_s": 1}},
            "lacks between_nodes_gb_per_s, and GPUs 0 and 1",
        ),
        ({"gpus": [GPU | {"count": 2}], "links": {"within_node_gb_per_s": 0}}, "within_node_gb_per_s is 0"),
        ({"gpus": [GPU], "links": {}, "bandwidth_gb_per_s": [[0]]}, "both links and bandwidth"),
        ({"gpus": [GPU], "bandwidth_gb_per_s": [[1, 2], [3]]}, "no square of numbers"),
        ({"gpus": [GPU], "bandwidth_gb_per_s": [["a"]]}, "no square of numbers"),
        ({"gpus": [GPU], "bandwidth_gb_per_s": [[1, 2], [3, 4]]}, "shape \\[2, 2\\] for 1 GPUs"),
        ({"gpus": [GPU | {"count": 2}], "bandwidth_gb_per_s": [[0, 1], [0, 0]]}, "not connected: GPU 1 to GPU 0"),
        ({"gpus": [GPU | {"count": 2}], "bandwidth_gb_per_s": [[0, -1], [1, 0]]}, "not connected: GPU 0 to GPU 1"),
    ],
)
def test_a_bad_topology_is_refused(tmp_path, content, told):
    with pytest.raises(PlacementError, match=told):
        read_topology(write(tmp_path, content))


def test_files_that_are_none_are_refused(tmp_path):
    write(tmp_path, "gpus = [", "bad.toml")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.toml").mkdir()
    write(tmp_path, "[" * 100_000, "deep.json")
    write(tmp_path, "a = " + "[" * 100_000, "deep.toml")
    for name, told in (
        ("bad.toml", "not TOML"),
        ("binary.json", "not JSON"),
        ("deep.json", "not JSON"),
        ("deep.toml", "not TOML"),
        ("folder.toml", "cannot be read"),
        ("absent.toml", "cannot be read: No such file"),
        ("t.yaml", r"ends in \.json or \.toml"),
    ):
        with pytest.raises(PlacementError, match=told):
            read_topology(tmp_path / name)
