"""The benchmark of reads compares every way with plain reads, and leaves no file behind."""

import json

import numpy as np
import pytest

import bench_reads
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey


def test_bench_reads_prints_a_row_for_each_case_and_removes_its_file(tmp_path, capsys):
    options = ["--experts", "6", "--expert-bytes", "20000", "--rounds", "1", "--reads", "6", "--part-kb", "8"]
    bench_reads.main([str(tmp_path), *options, "--depths", "1,4", "--demands", "1,3"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["plain_depth"] for row in rows[:2]] == [1, 4]
    cases = {(row["layout"], row["demanded"], row["way"]) for row in rows[2:]}
    ways = ("moeflow", "whole", "beside", "cut")
    assert cases == {(layout, at_once, way) for layout in ("packed", "unpacked") for at_once in (1, 3) for way in ways}
    assert all(row["to_plain"]["median"] > 0 and row["to_whole"]["n"] == 1 for row in rows[2:])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", [bench_reads.packed, bench_reads.unpacked])
def test_layouts_hold_experts_of_different_bytes(tmp_path, layout):
    path, source = tmp_path / "experts.bin", layout(4, 20_000)
    bench_reads.write_file(path, 3 + 4 * 20_480)
    store, seen = ExpertStore([path], [source]), set()
    for expert in range(4):
        record = np.zeros(20_480, np.uint8)
        store.read(ExpertKey(0, expert), record)
        seen.add(record[:20_000].tobytes())
    assert len(seen) == 4
    store.close()
