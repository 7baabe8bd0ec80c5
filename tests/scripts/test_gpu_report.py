"""The report on a card: every step runs in small on the CPU, and what was found stays however the run ends."""

import json
import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

import gpu_report
from gpu.bits import require_equal
from gpu.calls import summarise
from gpu.commands import counts
from gpu.plan import NAMES, STEPS
from gpu.plan import select as select_steps
from gpu.report_file import FAILED, OK, RUNNING, TIMED_OUT, UNAVAILABLE, Report
from gpu.runner import one_card, run_step
from gpu.table import markdown, resident_shares
from gpu.worker import FUNCTIONS
from helpers.paths import ROOT

SCRIPT = ROOT / "scripts" / "gpu_report.py"


def told_by(program, seconds=30.0):
    told = []
    return run_step([sys.executable, "-c", program], dict(os.environ), seconds, told.append), told


@pytest.mark.slow
def test_every_step_runs_through_in_small(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), "--work", str(tmp_path / "work")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    report = json.loads(out.read_text())
    assert done.returncode == 0, [step for step in report["steps"] if step["status"] != OK]
    assert report["finished"]
    found = {step["step"]: step for step in report["steps"]}
    assert set(found) == set(NAMES) - {"races"}
    assert found["compute_sanitizer"]["status"] in (OK, UNAVAILABLE)
    assert all(step["status"] == OK for name, step in found.items() if name != "compute_sanitizer")
    assert found["claims"]["facts"]["passed"] == 1
    assert len({row["digest"] for row in found["bits"]["rows"]}) == 1
    assert found["signals"]["facts"]["caught_in_generate"] >= 1
    assert [row["predictor"] for row in found["end_to_end"]["rows"]] == ["none", "auto"]
    assert all(row["same_tokens"] and row["tok_per_s"] > 0 for row in found["end_to_end"]["rows"])
    assert {row["right"] for row in found["bad_input"]["rows"]} == {True}
    assert out.with_suffix(".md").read_text().strip() == done.stdout.strip()


def test_every_step_has_a_function_and_cases_for_a_card():
    assert set(FUNCTIONS) == set(NAMES)
    assert all(step.cases for step in STEPS)
    assert all(step.dry for step in STEPS if step.name not in ("races", "end_to_end"))


def test_chosen_steps_bring_what_they_need_in_the_order_of_the_plan():
    assert [step.name for step in select_steps(["signals", "bandwidth"])] == ["card", "bandwidth", "models", "signals"]
    with pytest.raises(ValueError, match="known steps are card"):
        select_steps(["signal"])


def test_rows_told_before_a_failure_stay_with_the_end_of_what_was_printed():
    ended, told = told_by("import json; print(json.dumps({'row': 1}), flush=True); raise ValueError('broken')")
    assert (ended.status, told) == (FAILED, [{"row": 1}])
    assert ended.error.endswith("ValueError: broken")


def test_a_step_without_means_is_no_failure():
    ended, _ = told_by("import sys; print('no such program', file=sys.stderr); sys.exit(3)")
    assert (ended.status, ended.error) == (UNAVAILABLE, "no such program")


def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started():
    ended, told = told_by(
        "import json, subprocess, sys, signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(json.dumps({'row': child.pid}), flush=True)\n"
        "child.wait()",
        seconds=3.0,
    )
    assert ended.status == TIMED_OUT
    try:
        started = os.pidfd_open(told[0]["row"])
    except ProcessLookupError:
        return
    with os.fdopen(started, "rb") as ends:
        assert select.select([ends], [], [], 10)[0]


def test_an_entry_under_way_is_in_the_file(tmp_path):
    report = Report(tmp_path / "report.json", {})
    entry = report.begin("bandwidth", {"format": "int4"})
    report.add(entry, {"row": {"gb_per_s": 25.0}})
    (found,) = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert (found["status"], found["rows"]) == (RUNNING, [{"gb_per_s": 25.0}])


def test_a_step_sees_the_chosen_card_alone():
    assert one_card("cuda", {})["CUDA_VISIBLE_DEVICES"] == "0"
    assert one_card("cuda:2", {})["CUDA_VISIBLE_DEVICES"] == "2"
    assert one_card("cuda:1", {"CUDA_VISIBLE_DEVICES": "3,GPU-77"})["CUDA_VISIBLE_DEVICES"] == "GPU-77"
    assert one_card("cuda:2", {"CUDA_VISIBLE_DEVICES": "3,5"})["CUDA_VISIBLE_DEVICES"] == ""
    assert one_card("cpu", {"CUDA_VISIBLE_DEVICES": "3"})["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_there(tmp_path):
    out = tmp_path / "report.json"
    options = ["--dry-run", "--only", "signals", "--out", str(out), "--work", str(tmp_path)]
    command = [sys.executable, str(SCRIPT), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("report: models"):
            break
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    report = json.loads(out.read_text())
    assert process.returncode == 130
    assert [(step["step"], step["status"]) for step in report["steps"]] == [("card", OK), ("models", "interrupted")]
    assert not report["finished"]
    assert "CUT SHORT" in printed
    assert out.with_suffix(".md").is_file()


@pytest.mark.slow
def test_steps_that_time_is_too_short_for_are_named(tmp_path, capsys):
    out = tmp_path / "report.json"
    options = ["--dry-run", "--minutes", "0.001", "--only", "bandwidth,kernels", "--out", str(out)]
    assert gpu_report.main([*options, "--work", str(tmp_path)]) == 0
    report = json.loads(out.read_text())
    assert [step["status"] for step in report["steps"]] == [OK, "skipped", "skipped"]
    assert "it takes 1 s or more" in report["steps"][1]["error"]
    assert "2 runs skipped for want of time" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_card_it_ends_at_once(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert gpu_report.main(["--out", str(out), "--work", str(tmp_path), "--device", "cuda:77"]) == 2
    assert "sees no CUDA GPU" in capsys.readouterr().err
    assert [step["status"] for step in json.loads(out.read_text())["steps"]] == [UNAVAILABLE]


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    assert gpu_report.main(["--dry-run", "--out", str(tmp_path / "none" / "r.json"), "--work", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--only", "speed"], "known steps"), (["--minutes", "0"], "above 0"), (["--device", "tpu"], "cuda:N")],
)
def test_options_are_checked(options, word, capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(options)
    assert word in capsys.readouterr().err


def test_launches_synchronisations_and_the_link_are_counted_from_the_profile():
    def one(key, count, us=0):
        return SimpleNamespace(key=key, count=count, self_device_time_total=us)

    profile = [
        one("cudaLaunchKernel", 20), one("cuLaunchKernelEx", 8), one("cudaEventSynchronize", 4), one("aten::mm", 9),
        one("cudaMemcpyAsync", 6), one("Memcpy HtoD (Pinned -> Device)", 5, 200.0), one("Memcpy DtoH", 1, 50.0),
    ]  # fmt: skip
    assert summarise(profile, 4, 5_000_000) == {
        "launches_a_step": 7, "syncs_a_step": 1, "copies_a_step": 1.5, "streaming_gb_per_s": 25.0,
    }  # fmt: skip
    assert summarise([], 1, 0)["streaming_gb_per_s"] is None


def test_pytest_s_summary_is_read():
    assert counts("..F\n1 failed, 51 passed, 2 skipped in 3.21s\n") == {"failed": 1, "passed": 51, "skipped": 2}
    assert counts("1/7 tests collected (6 deselected) in 2.09s") == {"tests collected": 1, "deselected": 6}
    assert counts("Segmentation fault") == {}


def test_speeds_are_compared_with_full_residency_of_the_same_format():
    def entry(format, share, speed):
        case = {"format": format, "share": share, "miss": "copy"}
        return {"step": "end_to_end", "case": case, "rows": [{"predictor": "none", "tok_per_s": speed}]}

    graphs = entry("bfloat16", "100%", 160.0)
    graphs["case"]["cuda_graphs"] = True
    found = resident_shares(
        [entry("bfloat16", "100%", 80.0), entry("bfloat16", "45%", 60.0), entry("int4", "45%", 9.0), graphs]
    )
    assert [(row["of_resident"], row["wanted"]) for row in found] == [(1.0, None), (0.75, 0.9), (2.0, None)]


def test_different_logits_are_an_error_that_names_the_residencies():
    require_equal({"aa": ["100%, none, cold", "45%, none, cold"]})
    with pytest.raises(AssertionError, match=r"2 different outputs.*'bb': .'12%, auto, warm'"):
        require_equal({"aa": ["100%, none, cold"], "bb": ["12%, auto, warm"]})


def test_the_table_says_which_step_failed_and_why(tmp_path):
    report = Report(tmp_path / "report.json", {})
    report.end(report.begin("claims", {}), FAILED, 1.5, "a | b\nAssertionError: 3 failed")
    assert "| claims | failed | 1.5 | AssertionError: 3 failed |" in markdown(report.content)
