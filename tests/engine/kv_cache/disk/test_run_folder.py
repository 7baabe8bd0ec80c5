"""The files with which a sequence goes on: those that lead farthest, and of these the ones with the windows for it."""

import pytest
import torch

from moeflow.engine.kv_cache.disk.run_file import RunRow
from moeflow.engine.kv_cache.disk.run_folder import RunFolder
from moeflow.engine.kv_cache.layer_shape import LayerShape

WINDOW = 8
TRUNK, ONE, OTHER = [list(range(begin, begin + 60)) for begin in (100, 200, 300)]


def shapes(window):
    shape = LayerShape((1, 4), (1, 4), torch.float32, torch.device("cpu"))
    return {0: shape, 1: shape._replace(window=window)}


@pytest.fixture
def opened(tmp_path):
    """Makes a folder with an index of rows."""
    folders = []

    def make(*rows, window=WINDOW):
        folders.append(RunFolder(tmp_path, f"model{len(folders)}", shapes(window), 1 << 30))
        for row in rows:
            folders[-1].add(row)
        return folders[-1]

    yield make
    for folder in folders:
        folder.close()


def links(folder, tokens, place=0, stretches=()):
    return [(one.begin, one.reach, one.place) for one in folder.chain(None, tokens, place, list(stretches))]


def test_a_file_with_the_window_is_chosen_before_one_that_has_more_tokens(opened):
    longer, shorter = RunRow(None, [], TRUNK + ONE, [(80, 120)]), RunRow(None, [], TRUNK[:40], [(8, 40)])
    folder = opened(longer, shorter)
    assert links(folder, TRUNK[:50])[0] == (0, 40, 40)
    assert links(folder, TRUNK + ONE) == [(0, 120, 120)]
    bare = RunRow(None, [], TRUNK, [])
    whole = RunRow(None, [], TRUNK, [(20, 60)])
    assert links(opened(bare, whole), TRUNK + OTHER) == [(0, 60, 60)]


def test_a_window_of_another_branch_is_none_of_this_one(opened):
    folder = opened(RunRow(None, [], TRUNK + ONE, [(80, 120)]), RunRow(None, TRUNK, OTHER, []))
    assert [place for _, _, place in links(folder, TRUNK + OTHER)] == [0, 0]


def test_a_window_may_lie_in_two_files_or_in_the_tree(opened):
    folder = opened(RunRow(None, TRUNK, ONE, [(60, 64), (110, 120)]))
    assert links(folder, TRUNK + ONE[:4], 60) == [(60, 64, 0)]
    assert links(folder, TRUNK + ONE[:4], 60, [(50, 60)]) == [(60, 64, 64)]
    folder.add(RunRow(None, [], TRUNK, [(53, 60)]))
    assert links(folder, TRUNK + ONE[:4]) == [(0, 60, 60), (60, 64, 64)]


@pytest.mark.parametrize("window", [0, WINDOW])
def test_a_branch_goes_on_from_the_middle_of_another_ones_file(opened, window):
    parts = [[(40, 60), (100, 120)], [(100, 120)]] if window else [[], []]
    rows = RunRow(None, [], TRUNK + ONE, parts[0]), RunRow(None, TRUNK, OTHER, parts[1])
    assert links(opened(*rows, window=window), TRUNK + OTHER) == [(0, 60, 60), (60, 120, 120)]


def test_what_lies_before_the_place_is_not_counted(opened):
    folder = opened(RunRow(None, [], TRUNK, [(30, 40)]))
    assert links(folder, TRUNK, 36) == [(36, 60, 0)], "(36, 40) is less than a window"
    assert links(folder, TRUNK, 36, [(20, 36)]) == [(36, 60, 40)]


def test_a_file_takes_the_place_of_those_that_are_in_it_and_of_no_others(opened):
    first, branch = RunRow(None, [], TRUNK, [(40, 60)]), RunRow(None, TRUNK, OTHER, [(110, 120)])
    scaled, windowed = RunRow((2,), [], TRUNK, [(40, 60)]), RunRow(None, [], TRUNK[:50], [(10, 50)])
    folder = opened(first, branch, scaled, windowed)
    folder.add(RunRow(None, [], TRUNK + ONE, [(40, 60), (100, 120)]))
    assert folder.entry_of(first).end == 120
    assert len(folder) == 4
    assert all(folder.entry_of(row).end == len(row.before + row.tokens) for row in (branch, scaled, windowed))
    assert folder.num_bytes == sum(entry.file_bytes for entry in folder._entries.values())
    assert folder.num_removed == 0
