"""A loaded model obeys its plan: what is refused, which line is named, and what is told afterwards."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from helpers.plans import small_plan
from moeflow import Engine, SamplingParams, hardware, load_moe
from moeflow.convert.quantize import quantize_model
from moeflow.errors import BudgetError, ConfigError
from moeflow.fit.contract import Contract, summary
from moeflow.fit.plan import Plan
from moeflow.fit.sizes import sizes_of
from moeflow.machine.identity import hardware as machine_name


def plan_for(folder: Path, **fields) -> Plan:
    """A plan of this model on this machine, whose process may be as large as the one that runs the tests."""
    sizes = sizes_of(folder)
    all_bytes = sizes.experts_bytes(sizes.published)
    lines = small_plan().lines | {
        "dense": sizes.dense_bytes,
        "experts": all_bytes // 2,
        "key_values": sizes.key_value_bytes(64),
        "process": hardware.process_memory_bytes()[0] + 10**8,
    }
    options = {"device": "cpu", "expert_memory": lines["experts"], "kv_memory": lines["key_values"]}
    plan = small_plan(
        model=sizes.config.fingerprint, machine=machine_name(), stored=sizes.published.kernel, lines=lines,
        options=options,
    )  # fmt: skip
    return replace(plan, **fields)


@pytest.fixture
def plan(mixtral_folder) -> Plan:
    return plan_for(mixtral_folder)


def test_a_model_is_loaded_by_its_plan_and_tells_planned_and_actual(mixtral_folder, plan, tmp_path):
    plan.save(tmp_path / "plan")
    with load_moe(mixtral_folder, plan=tmp_path / "plan", predictor=None, step="python").moeflow as runtime:
        assert runtime.snapshot().memory["expert_budget_bytes"] == plan.lines["experts"]
    model = load_moe(mixtral_folder, plan=plan, predictor=None, step="python")
    with model.moeflow:
        model.generate(torch.arange(5)[None], max_new_tokens=6, do_sample=False, min_new_tokens=6)
        told = model.moeflow.stats()["plan"]
        assert set(told["lines"]) == set(plan.lines)
        assert {name: line["planned_bytes"] for name, line in told["lines"].items()} == plan.lines
        dense = sum(parameter.nbytes for parameter in model.parameters())
        assert dense <= told["lines"]["dense"]["actual_bytes"] <= dense + 10**5
        assert told["lines"]["experts"]["actual_bytes"] == model.moeflow.stats()["memory"]["device_peak_bytes"]
        assert told["total"]["actual_bytes"] == model.moeflow.stats()["memory"]["process_peak_bytes"]
        assert told["decode_tok_s"]["actual"] > 0
        assert told["prefill_tok_s"]["actual"] > 0
        assert "experts" in summary(told)
        assert json.dumps(told)


def test_an_engine_takes_the_keys_and_values_of_the_plan_and_no_more(mixtral_folder, plan):
    model = load_moe(mixtral_folder, plan=plan, predictor=None, step="python")
    with model.moeflow:
        with Engine(model, max_batch_size=1) as engine:
            assert engine.stats()["kv_budget_bytes"] <= plan.lines["key_values"]
            assert model.moeflow.stats()["plan"]["lines"]["key_values"]["actual_bytes"] == 0
        with pytest.raises(BudgetError, match=r"key_values: 2,097,152,000 bytes are needed, and the plan has 49,152"):
            Engine(model, kv_memory="2000MiB")


@pytest.mark.parametrize("step", ["python", "auto"])
def test_generate_is_refused_what_the_plan_has_no_room_for_and_goes_on_afterwards(step, mixtral_folder, plan):
    """The plan has one sequence of 64 positions."""
    model = load_moe(mixtral_folder, plan=plan, predictor=None, step=step)
    with model.moeflow:
        right = model.generate(torch.arange(1, 9)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
        with pytest.raises(BudgetError, match=r"^activations: a pass of 65 tokens is asked for, .* room for 64"):
            model.generate(torch.arange(1, 66)[None], max_new_tokens=1)
        with pytest.raises(BudgetError, match=r"^activations: a pass of 80 tokens"):
            model.generate(torch.ones(5, 16, dtype=torch.long), max_new_tokens=1)
        with pytest.raises(
            BudgetError, match=r"^key_values: 65 positions would be kept, and the plan has 64 \(1 x 64\)"
        ):
            model.generate(torch.arange(1, 61)[None], max_new_tokens=8, min_new_tokens=8)
        with pytest.raises(BudgetError, match=r"^key_values: 66 positions would be kept"):
            model.generate(torch.ones(6, 8, dtype=torch.long), max_new_tokens=8, min_new_tokens=8)
        assert model.generate(torch.arange(1, 61)[None], max_new_tokens=5, min_new_tokens=5).shape == (1, 65)
        again = model.generate(torch.arange(1, 9)[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert torch.equal(again, right)


def test_an_engine_makes_passes_no_longer_than_planned(mixtral_folder, plan):
    model = load_moe(mixtral_folder, plan=plan, predictor=None, step="python")
    with model.moeflow, Engine(model, kv_memory=plan.lines["key_values"], max_batch_size=2) as engine:
        done = engine.generate([list(range(1, 41)), list(range(41, 81))], SamplingParams(max_new_tokens=4))
        assert {one.finish_reason for one in done} <= {"length", "stop"}
        assert engine.stats()["passes"] > 4


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "f" * 16}, r"another model: of a mixtral with fingerprint f{16}, and .* is a mixtral with"),
        ({"machine": "a processor, 2 cores"}, "another machine: a processor, 2 cores; this one is"),
        (
            {"stored": "int4-g64"},
            r"experts in int4-g64, and these are in float32. Write the folder with moeflow quantize",
        ),
    ],
)
def test_a_plan_of_something_else_is_named_and_refused(fields, error, mixtral_folder, plan):
    with pytest.raises(ConfigError, match=error):
        load_moe(mixtral_folder, plan=replace(plan, **fields))


@pytest.mark.parametrize("line", ["dense", "pinned", "process"])
def test_going_over_a_line_is_refused_with_its_name(line, mixtral_folder, plan):
    short = replace(plan, lines=plan.lines | {line: 0})
    with pytest.raises(BudgetError, match=f"^{line}: "):
        load_moe(mixtral_folder, plan=short)


def test_a_plan_larger_than_the_memory_is_refused_before_anything_is_read(mixtral_folder, plan):
    large = replace(plan, lines=plan.lines | {"activations": 1 << 50})
    with pytest.raises(BudgetError, match=r"most of them for activations .* are free in the limits of this process"):
        load_moe(mixtral_folder, plan=large)


def test_a_size_beside_a_plan_is_refused_unless_it_is_the_same(mixtral_folder, plan):
    with pytest.raises(ConfigError, match=r"expert_memory='25%' was given beside a plan"):
        load_moe(mixtral_folder, plan=plan, expert_memory="25%")
    load_moe(mixtral_folder, plan=plan, device="cpu").moeflow.close()
    with pytest.raises(ConfigError, match=r"it must be a plan of moeflow\.fit"):
        load_moe(mixtral_folder, plan=7)


def test_a_quantised_folder_is_of_the_same_model_and_another_format(mixtral_folder, plan, tmp_path):
    quantize_model(mixtral_folder, tmp_path / "int8", "int8-g64", method="rtn")
    other = plan_for(tmp_path / "int8")
    assert other.model == plan.model
    assert (plan.stored, other.stored) == ("float32", "int8-g64")
    load_moe(tmp_path / "int8", plan=other, predictor=None).moeflow.close()


def test_limits_of_memory_and_threads_are_no_other_machine(mixtral_folder, plan):
    contract = Contract(replace(plan, machine=f"{machine_name()}, OMP_NUM_THREADS=7"))
    contract.check_model(mixtral_folder)


@pytest.mark.slow
def test_the_command_line_loads_by_a_plan_and_tells_what_was_kept(mixtral_folder, tmp_path, speaking_folder):
    made = plan_for(speaking_folder)
    replace(made, lines=made.lines | {"process": 4 * 10**9}).save(tmp_path / "plan")
    command = [sys.executable, "-m", "moeflow", "generate", speaking_folder, "hello", "--plan", tmp_path / "plan"]
    command += ["--max-new-tokens", "4", "--step", "python"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "plan: dense" in run.stderr
    assert "planned 10 (8 to 12)" in run.stderr
