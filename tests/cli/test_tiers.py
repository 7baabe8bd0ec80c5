"""`moeflow tiers` as a user types it: budgets are kept, and advice rests on replays of what was held out."""

import json

import numpy as np
import pytest

from moeflow.cli.main import main
from moeflow.replay.demand import replay, sequence_rows
from moeflow.trace.format import TraceFormat
from moeflow.trace.trace import RoutingTrace
from moeflow.trace.workloads import counted, held_out_sequences
from moeflow.trace.writer import TraceWriter


def write_trace(path, routes):
    """Write sequences of [tokens, layers, ranks] routes over 8 experts."""
    layers, top_k = routes[0].shape[1:]
    with TraceWriter(path, TraceFormat((8,) * layers, top_k, "model", has_weights=False)) as writer:
        for number, experts in enumerate(routes):
            rows = writer.new_rows(len(experts))
            rows["experts"], rows["sequence"], rows["phase"] = experts, number, 1
            writer.write(rows)
    return str(path)


def drifting():
    """Each sequence likes two experts of its own: a cache follows, a fixed choice cannot."""
    return [np.stack([np.arange(60)[:, None] % 2 + 2 * (n % 4)] * 3, axis=1) for n in range(12)]


def skewed():
    """Expert 0 every other token, the others in turn: a cache is swept by them."""
    tokens = np.arange(70)
    return [np.stack([np.where(tokens % 2, 0, 1 + tokens // 2 % 7)[:, None]] * 3, axis=1)] * 3


def tiers(capsys, *arguments):
    assert main(["tiers", *map(str, arguments), "--expert-mb", "10", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tiers_keep_within_their_memory_and_the_most_used_come_first(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"load": [[5, 1, 9, 2], [1, 8, 1, 7]], "top_k": 2}))
    options = ("--gpu-memory", "35MB", "--host-memory", "25%")
    about = tiers(capsys, tmp_path / "c.json", *options)
    assert about["tiers"] == [["host", "disk", "gpu", "host"], ["disk", "gpu", "disk", "gpu"]]
    assert [(row["tier"], row["experts"]) for row in about["tiers_of"]] == [("gpu", 3), ("host", 2), ("disk", 3)]
    assert about["hit_rate"] == {"static": pytest.approx((9 / 17 + 15 / 17) / 2)}
    assert about["best"] == "static"


def test_a_trace_of_which_the_experts_change_is_given_to_a_cache(tmp_path, capsys):
    about = tiers(capsys, write_trace(tmp_path / "t", drifting()), "--gpu-memory", "60MB")
    assert about["best"] in ("lru", "lfu", "lfru")
    assert about["saved_s_per_token"] > 0
    assert about["hit_rate"]["belady"] >= max(about["hit_rate"][name] for name in ("lru", "lfu", "lfru"))


def test_a_trace_with_hot_experts_is_given_a_fixed_choice(tmp_path, capsys):
    about = tiers(capsys, write_trace(tmp_path / "t", skewed()), "--gpu-memory", "30MB")
    assert about["best"] == "static"
    assert about["hit_rate"]["static"] == pytest.approx(0.5)
    assert about["saved_s_per_token"] < 0


def test_what_is_held_out_is_judged_alone(tmp_path, capsys):
    path = write_trace(tmp_path / "t", drifting())
    about = tiers(capsys, path, "--gpu-memory", "60MB", "--hold-out", 4, "--host-gb-s", 10, "--disk-gb-s", 5)
    trace = RoutingTrace.open(path)
    numbers = held_out_sequences(trace, 4)
    held_out = counted(trace, "held out", numbers)
    resident = np.array(about["tiers"]) == "gpu"
    rate = held_out.load[resident].sum() / held_out.load.sum()
    assert about["hit_rate"]["static"] == pytest.approx(rate)
    assert about["s_per_token"]["static"] == pytest.approx((1 - rate) * 3 * 10**7 / 10e9)
    experts, starts = sequence_rows(trace.select(numbers), "all")
    expected = replay(experts, 8, starts, int(resident.sum()), "lru", warm=True).hit_rate
    assert about["hit_rate"]["lru"] == expected
    assert about["judged_on"].endswith("held out")


def test_the_tables_end_with_the_advice(tmp_path, capsys):
    path = write_trace(tmp_path / "t", drifting())
    for memory, told in (("25%", "let the cache"), ("100%", "nothing needs to move")):
        assert main(["tiers", path, "--gpu-memory", memory, "--expert-mb", "10"]) == 0
        out = capsys.readouterr().out
        assert told in out.splitlines()[-1]
        assert "static: always the same" in out


def test_counts_alone_give_no_advice_on_caches(tmp_path, capsys):
    (tmp_path / "c.json").write_text(json.dumps({"load": [[5, 1, 9, 2]], "top_k": 1}))
    assert main(["tiers", str(tmp_path / "c.json"), "--gpu-memory", "50%", "--expert-mb", "10"]) == 0
    assert "give a trace to compare with caches" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpu-memory", "lots"], "--gpu-memory='lots' is not a memory size"),
        (["--gpu-memory", "50%", "--host-memory", "101%"], "more than all experts"),
        (["--gpu-memory", "50%", "--host-gb-s", "0"], "--host-gb-s 0 is out of range"),
        (["--gpu-memory", "50%", "--disk-gb-s", "nan"], "--disk-gb-s nan is out of range"),
        (["--gpu-memory", "50%", "--top-k", "0"], "--top-k 0 is out of range"),
        (["--gpu-memory", "50%", "--hold-out", "5"], "holds counts"),
        (["--gpu-memory", "50%"], "the counts do not say how many experts a token takes: give --top-k"),
        (["--gpu-memory", "50%", "--top-k", "5"], "--top-k 5 is out of range: a layer has 4 experts"),
    ],
)
def test_a_bad_option_is_told_in_one_line(tmp_path, capsys, options, told):
    (tmp_path / "c.json").write_text(json.dumps({"load": [[5, 1, 9, 2]]}))
    assert main(["tiers", str(tmp_path / "c.json"), "--expert-mb", "10", *options]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("moeflow: ")
    assert told in error


def test_top_k_of_a_trace_is_not_contradicted(tmp_path, capsys):
    path = write_trace(tmp_path / "t", [np.stack([np.arange(20) % 4, np.arange(20) % 4 + 4], 1)[:, None]] * 2)
    assert main(["tiers", path, "--gpu-memory", "50%", "--expert-mb", "10", "--top-k", "1"]) == 1
    assert "--top-k 1 contradicts the counts, which say 2" in capsys.readouterr().err


def test_a_gpu_too_small_for_one_layer_of_a_token_is_refused(tmp_path, capsys):
    path = write_trace(tmp_path / "t", [np.stack([np.arange(20) % 4, np.arange(20) % 4 + 4], 1)[:, None]] * 2)
    assert main(["tiers", path, "--gpu-memory", "10MB", "--expert-mb", "10"]) == 1
    assert "fewer than the 2 experts" in capsys.readouterr().err
