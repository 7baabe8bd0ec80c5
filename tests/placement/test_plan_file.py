"""Plan files: what is written is read back, whole or not at all, and bad files are refused with what is wrong."""

import json
import random
from contextlib import suppress

import numpy as np
import pytest

from helpers.damage import damaged
from moeflow.errors import PlacementError
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.files.plan import read_plan, read_plan_facts, solution_facts, write_plan
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.topology import preset
from moeflow.placement.workload import Workload

PLAN = Plan(3, (((0,), (0, 2), (1,), (2,)), ((2,), (1,), (0, 1, 2), (0,))))


def solved(bound=0.0):
    rng = np.random.default_rng(0)
    seen, other = (
        Workload(name, rng.random((2, 4)) + 1, rng.random((1, 4, 4)), first_layer=3) for name in ("seen", "other")
    )
    problem = Problem((seen,), preset("nvlink", 3), StepShape(), num_replicas=3)
    solution = Solution("mine", PLAN, problem.objective(PLAN), bound, "balance", 1.5, "time limit")
    return problem, solution, other


def test_a_plan_is_read_as_it_was_written_and_nothing_else_is_left(tmp_path):
    write_plan(tmp_path / "p.json", PLAN)
    assert read_plan(tmp_path / "p.json") == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]
    assert json.loads((tmp_path / "p.json").read_text())["experts"][0] == [[0], [0, 2], [1], [2]]


def test_facts_hold_the_solvers_claims_and_costs_in_and_out_of_sample(tmp_path):
    problem, solution, other = solved(bound=1e-4)
    write_plan(tmp_path / "p.json", PLAN, solution_facts(problem, solution, seed=7, held_out=[other]))
    facts = read_plan_facts(tmp_path / "p.json")
    assert "experts" not in facts
    assert (facts["format"], facts["version"], facts["num_gpus"], facts["first_layer"]) == ("moeflow-plan", 1, 3, 3)
    assert (facts["solver"], facts["status"], facts["seed"], facts["time_s"]) == ("mine", "time limit", 7, 1.5)
    assert (facts["objective_s"], facts["bound_s"], facts["gap"]) == (solution.objective, 1e-4, solution.gap)
    assert (facts["topology"], facts["workloads"], facts["held_out_workloads"]) == ("nvlink", ["seen"], ["other"])
    assert facts["costs"][0]["step_s"] == pytest.approx(solution.objective)
    expected = judge(PLAN, other, problem.topology, problem.step).summary()
    assert facts["held_out_costs"] == [expected]


def test_a_gap_without_a_bound_is_null_as_json_knows_no_infinity(tmp_path):
    problem, solution, _ = solved()
    write_plan(tmp_path / "p.json", PLAN, solution_facts(problem, solution))
    assert read_plan_facts(tmp_path / "p.json")["gap"] is None
    assert "Infinity" not in (tmp_path / "p.json").read_text()


def test_a_plan_that_cannot_be_written_leaves_what_was_there(tmp_path):
    with pytest.raises(PlacementError, match="cannot be written"):
        write_plan(tmp_path / "nowhere" / "p.json", PLAN)
    (tmp_path / "p.json").mkdir()
    with pytest.raises(PlacementError, match="cannot be written"):
        write_plan(tmp_path / "p.json", PLAN)
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_a_plan_cut_anywhere_is_refused(tmp_path):
    write_plan(tmp_path / "p.json", PLAN, {"solver": "mine"})
    whole = (tmp_path / "p.json").read_bytes().rstrip()
    for end in range(0, len(whole), 7):
        (tmp_path / "cut.json").write_bytes(whole[:end])
        with pytest.raises(PlacementError, match="truncated or no JSON"):
            read_plan(tmp_path / "cut.json")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "other"}, 'its "format" is not "moeflow-plan"'),
        ({"format": None}, "is no plan"),
        ({"version": 2}, "version 2, and this moeflow reads up to 1. Update moeflow"),
        ({"version": "1"}, "version '1'"),
        ({"version": 0}, "version 0"),
        ({"num_gpus": 0}, "num_gpus is 0"),
        ({"num_gpus": 3.0}, "num_gpus is 3.0"),
        ({"num_gpus": True}, "num_gpus is True"),
        ({"first_layer": -1}, "first_layer is -1"),
        ({"experts": None}, "experts must be a list of layers"),
        ({"experts": {}}, "experts must be a list of layers"),
        ({"experts": [3]}, "experts must be a list of layers"),
        ({"experts": [[3]]}, "experts must be a list of layers"),
        ({"experts": [[["0"]]]}, "experts must be a list of layers"),
        ({"experts": [[[0.0]]]}, "experts must be a list of layers"),
        ({"experts": [[[True]]]}, "experts must be a list of layers"),
        ({"experts": [[[-1]]]}, "experts must be a list of layers"),
        ({"experts": []}, "p.json: a plan without experts"),
        ({"experts": [[]]}, "p.json: a plan without experts"),
        ({"experts": [[[]]]}, "p.json: the plan puts expert 0 of layer 0 on GPUs"),
        ({"experts": [[[0, 0]]]}, "distinct GPUs"),
        ({"experts": [[[3]]]}, "from 0 to 2"),
        ({"experts": [[[0]], [[0], [1]]]}, "All layers have the same number"),
    ],
)
def test_a_bad_plan_is_refused(tmp_path, change, told):
    write_plan(tmp_path / "p.json", PLAN)
    content = json.loads((tmp_path / "p.json").read_text()) | change
    del content["crc32"]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(PlacementError, match=told):
        read_plan(tmp_path / "p.json")


def test_files_that_are_no_plans_are_refused(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, told in (
        ("deep.json", "no JSON"),
        ("list.json", "is no plan"),
        ("binary.json", "no JSON"),
        ("absent.json", "cannot be read"),
    ):
        with pytest.raises(PlacementError, match=told):
            read_plan(tmp_path / name)


def test_a_damaged_plan_is_refused_or_read_as_it_was(tmp_path):
    file = tmp_path / "p.json"
    write_plan(file, PLAN, {"solver": "mine", "seed": 7})
    whole, facts, rng, told = file.read_bytes(), read_plan_facts(file), random.Random(0), []
    for _ in range(1000):
        file.write_bytes(damaged(whole, rng, 100))
        try:
            assert read_plan(file) == PLAN
            assert facts.items() <= read_plan_facts(file).items()  # a "crc32" that was hit is an unknown key
        except PlacementError as error:
            told.append(str(error))
    assert len(told) > 900
    assert all(text.startswith(str(file)) for text in told)


def test_a_plan_of_a_hand_or_of_an_older_moeflow_has_no_checksum(tmp_path):
    file = tmp_path / "p.json"
    write_plan(file, PLAN)
    text = file.read_text()
    file.write_text(text.replace("[0,2]", "[0,1]"))
    with pytest.raises(PlacementError, match=r"changed by hand: .* the line \"crc32\" is deleted"):
        read_plan(file)
    content, rng = "\n".join(line for line in text.split("\n") if "crc32" not in line).encode(), random.Random(1)
    file.write_bytes(content)
    assert read_plan(file) == PLAN
    for _ in range(1000):
        file.write_bytes(damaged(content, rng, 100))
        with suppress(PlacementError):
            read_plan(file)
