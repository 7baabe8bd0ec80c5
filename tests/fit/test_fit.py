"""moeflow.fit and the command: the plan, its table, its exit code, and what they say of bad input."""

import json
import os
import subprocess
import sys

import pytest

import moeflow
from bench.cgroup import CgroupUnavailable, run_process
from helpers.hub_server import ID, hub
from helpers.large_checkpoint import LARGE_CONFIG, write_large_checkpoint
from helpers.machine_profiles import small_profile
from helpers.paths import ROOT
from moeflow.cli.fit import advice, commands_for, survey_table
from moeflow.cli.main import main
from moeflow.errors import BudgetError, ConfigError, ModelSourceError, TraceError
from moeflow.fit.fit import survey
from moeflow.fit.memory import PROCESS_BYTES
from moeflow.fit.plan import Plan
from moeflow.machine.identity import disk_of, hardware
from moeflow.machine.store import keep_profile


@pytest.fixture
def profile(mixtral_folder, tmp_path, monkeypatch):
    """The profile that is kept of this machine, in a cache folder of its own."""
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    profile = small_profile(hardware=hardware(), disk=disk_of(mixtral_folder))
    keep_profile(profile)
    return profile


def test_the_plan_is_that_of_the_recommended_row(mixtral_folder, profile):
    plan = moeflow.fit(mixtral_folder, context=128, memory="4GB")
    found = survey(mixtral_folder, context=128, memory="4GB", profile=profile)
    row = found.recommended
    assert row is not None
    assert isinstance(plan, Plan)
    assert (plan.context, plan.batch, plan.memory_bytes, plan.machine) == (128, 1, 4 * 10**9, hardware())
    assert plan.options == {
        "device": "cpu", "expert_memory": row.lines["experts"], "kv_memory": row.lines["key_values"],
    }  # fmt: skip
    assert plan.total_bytes <= 0.97 * plan.memory_bytes


def test_a_process_that_holds_more_already_is_planned_with_it(mixtral_folder, profile):
    from moeflow.hardware import process_memory_bytes

    assert moeflow.fit(mixtral_folder, memory="40GB").lines["process"] > process_memory_bytes()[0]


def test_memory_that_is_too_small_says_by_how_much(mixtral_folder, profile):
    with pytest.raises(BudgetError, match=r"does not fit in .*: its smallest way .* too many; .* never left on disk"):
        moeflow.fit(mixtral_folder, memory="100MB")


def test_a_target_beyond_any_row_says_what_bounds_it(mixtral_folder, profile):
    with pytest.raises(
        BudgetError, match=r"no way that fits reaches 1e\+09 tok/s: the fastest .* Most of its step goes"
    ):
        moeflow.fit(mixtral_folder, memory="40GB", target=1e9)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"context": 0}, ConfigError, "context=0 is not a count"),
        ({"context": 10**6}, ConfigError, "more than the 256 positions"),
        ({"batch": True}, ConfigError, "batch=True"),
        ({"device": "cuda"}, ConfigError, "device='cuda' is not planned"),
        ({"memory": "25%"}, ConfigError, "a share of nothing"),
        ({"memory": "0"}, ConfigError, "is none"),
        ({"target": -1}, ConfigError, "target=-1 is no speed"),
        ({"trace": "nowhere.trace"}, TraceError, "nowhere.trace"),
    ],
)
def test_a_malformed_option_is_named(options, error, text, mixtral_folder, profile):
    with pytest.raises(error, match=text):
        moeflow.fit(mixtral_folder, **options)


def test_a_model_that_is_nowhere_is_named(profile):
    with pytest.raises(ModelSourceError, match="nowhere"):
        moeflow.fit("./nowhere")


def test_the_command_prints_a_table_a_sentence_and_the_lines_to_run(mixtral_folder, profile, tmp_path, capsys):
    plan = tmp_path / "model.plan"
    assert main(["fit", str(mixtral_folder), "--memory", "40GB", "-o", str(plan)]) == 0
    out = capsys.readouterr().out
    assert "as published (float32)" in out
    assert f"moeflow chat {mixtral_folder} --plan {plan}" in out or "--plan" in out
    assert Plan.load(plan).model_type == "mixtral"
    assert main(["fit", str(mixtral_folder), "--memory", "40GB", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["rows"][about["recommended"]]["fits"]
    assert about["plan"]["lines"] == about["rows"][about["recommended"]]["lines"]


def test_a_memory_cgroup_smaller_than_the_dense_weights_is_said_to_be_too_small(tmp_path):
    """The limit is a real one; the checkpoint of 671B parameters is made of sparse files."""
    write_large_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LARGE_CONFIG))
    code = (
        "import sys, json; from moeflow.fit.fit import survey; from moeflow.machine.profile import MachineProfile\n"
        "found = survey(sys.argv[1], profile=MachineProfile.from_dict(json.loads(sys.argv[2])))\n"
        "print(found.recommended, found.wish.memory_bytes, found.why_not(), sep='|')"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(small_profile().to_dict())]
    try:
        run = run_process(command, limit_bytes=300_000_000, timeout_s=120)
    except CgroupUnavailable as error:
        pytest.skip(f"no memory cgroup here: {error}")
    assert run.returncode == 0, run.stderr
    recommended, memory_bytes, why = run.stdout.strip().split("|")
    assert recommended == "None"
    assert 0 < int(memory_bytes) <= 300_000_000
    assert "does not fit in" in why
    assert "weights that are never left on disk" in why


def test_the_exit_code_is_1_where_nothing_fits_and_where_the_target_is_not_reached(mixtral_folder, profile, capsys):
    assert main(["fit", str(mixtral_folder), "--memory", "100MB"]) == 1
    assert "does not fit in" in capsys.readouterr().out
    assert main(["fit", str(mixtral_folder), "--memory", "40GB", "--target", "1e9"]) == 1
    assert "no way that fits reaches" in capsys.readouterr().out
    assert main(["fit", "./nowhere"]) == 1


def test_a_row_that_must_be_written_first_has_the_command_that_writes_it(mixtral_folder, profile):
    from dataclasses import replace

    found = survey(mixtral_folder, memory="40GB", profile=profile)
    for row in found.rows:
        lines = commands_for(replace(found, recommended=row), "a plan")
        assert len(lines) == 2 + (not row.form.is_published)
        assert lines[-2].endswith("--plan 'a plan'")
    assert survey_table(found).row_count == len(found.rows)
    assert advice(found).startswith("Take ")


def test_the_help_imports_neither_torch_nor_numpy():
    code = (
        "import sys\nfrom moeflow.cli.main import main\ntry: main(['fit', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'rich') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == "[]"


def test_a_hub_id_is_planned_from_its_headers_alone(mixtral_folder, profile, tmp_path):
    files = {file.name: file for file in mixtral_folder.iterdir() if file.is_file()}
    weights = sum(file.stat().st_size for name, file in files.items() if name.endswith(".safetensors"))
    code = (
        "import sys, json; from moeflow.fit.fit import survey; from moeflow.machine.profile import MachineProfile\n"
        "profile = MachineProfile.from_dict(json.loads(sys.argv[2]))\n"
        "found = survey(sys.argv[1], memory='40GB', profile=profile)\n"
        "print(json.dumps(found.rows[-1].lines), 'torch' in sys.modules)"
    )
    with hub(files) as served:
        environment = os.environ | {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-c", code, ID, json.dumps(profile.to_dict())]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        sent = sum(served.sent(name) for name in files if name.endswith(".safetensors"))
    assert run.returncode == 0, run.stderr
    lines, has_torch = run.stdout.rsplit(" ", 1)
    assert json.loads(lines) == survey(mixtral_folder, memory="40GB", profile=profile).rows[-1].lines | {
        "process": PROCESS_BYTES
    }
    assert has_torch.strip() == "False"
    assert 0 < sent < weights
