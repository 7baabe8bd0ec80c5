"""Expert parallelism on real gloo ranks: one process's logits, the cost model's bytes, failures that all see.

The ranks run `helpers/parallel_ranks.py`, every situation in one launch, and write down what they saw.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.parallel_ranks import answers, few_of, load, num_new_tokens_of, own_passes, prompts_of, replicated_plan
from helpers.paths import ROOT
from moeflow.cli.main import main
from moeflow.convert.pack import pack_model
from moeflow.errors import ConfigError
from moeflow.expert_parallel.expert_parallel import apply
from moeflow.expert_parallel.replicas import ReplicaTable
from moeflow.kernels.cpu.library import instruction_set
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.files.plan import write_plan
from moeflow.placement.plan import Plan, replica_of
from moeflow.placement.topology import preset
from moeflow.placement.workload import Workload

pytestmark = pytest.mark.slow

PLANS = ("contiguous", "replicated")
FAMILIES_OF = {2: ("mixtral", "gpt_oss", "zaya"), 4: ("mixtral", "gpt_oss")}
CASES = [(num_ranks, family) for num_ranks, families in FAMILIES_OF.items() for family in families]


@pytest.fixture(scope="module")
def folders(mixtral_folder, tmp_path_factory):
    """Checkpoints: mixtral; gpt_oss, stacked with biases; zaya, whose tokens may take no expert."""
    below = tmp_path_factory.mktemp("families")
    for name in ("gpt_oss", "zaya"):
        build_model(FAMILIES[name]).save_pretrained(below / name)
    return {"mixtral": mixtral_folder, "gpt_oss": below / "gpt_oss", "zaya": below / "zaya"}


@pytest.fixture(scope="module")
def launch(folders, tmp_path_factory):
    """Run the ranks, once for each number of them; return what each saw."""
    launched = {}

    def launch(num_ranks):
        if num_ranks not in launched:
            out = tmp_path_factory.mktemp(f"ranks{num_ranks}")
            used = {name: str(folders[name]) for name in FAMILIES_OF[num_ranks]}
            (out / "folders.json").write_text(json.dumps(used))
            command = [ROOT / "tests" / "helpers" / "parallel_ranks.py", out / "folders.json", out]
            codes, texts = run_ranks(num_ranks, command)
            assert codes == [0] * num_ranks, "\n".join(texts)
            launched[num_ranks] = (
                [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)],
                [torch.load(file, weights_only=False) for file in sorted(out.glob("death*.pt"))],
            )
        return launched[num_ranks]

    return launch


def run_ranks(num_ranks, command, **environment):
    """Start a command as the ranks of one run; return their exit codes, and what each printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(num_ranks)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        texts = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], texts


def expected_assignments(seen):
    """[L, G, G]: what the plan says of the calls that the ranks counted, call by call."""
    plan, total = seen[0]["plan"], 0
    num_calls = max(len(calls) for one in seen for calls in one["calls"])
    for number in range(num_calls):
        counts = np.zeros((plan.num_gpus, plan.num_layers, plan.num_experts), np.int64)
        for rank, one in enumerate(seen):
            for layer, calls in enumerate(one["calls"]):
                if number < len(calls):
                    counts[rank, layer] = calls[number].numpy()
        total = total + plan.assignments(counts)
    return total


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4])
def test_a_whole_call_is_assigned_as_the_plan_assigns_one_by_one(num_gpus):
    generator = torch.Generator().manual_seed(num_gpus)
    gpus = [sorted({expert % num_gpus, 0, num_gpus - 1}) if expert % 3 else [0] for expert in range(8)]
    top_k_index = torch.randint(0, 10, (50, 3), generator=generator)  # 8 and 9 are no experts
    for home in range(num_gpus):
        places, counts = ReplicaTable(gpus, home, num_gpus).assign(top_k_index)
        expected, seen = [], [0] * 8
        for place, expert in enumerate(top_k_index.flatten().tolist()):
            if expert < 8:
                expected.append((replica_of(gpus[expert], home, seen[expert]), expert, place))
                seen[expert] += 1
        assert places.tolist() == [place for _, _, place in sorted(expected)]
        for gpu in range(num_gpus):
            for expert in range(8):
                assert counts[gpu, expert] == sum(found[:2] == (gpu, expert) for found in expected)


@pytest.mark.parametrize(("num_ranks", "family"), CASES)
def test_logits_and_answers_are_those_of_one_process(launch, folders, num_ranks, family):
    """Ranks have prompts and answers of different lengths, or none, and plans with and without replicas."""
    seen, _ = launch(num_ranks)
    with (model := load(folders[family])).moeflow:
        for rank in range(num_ranks):
            expected = answers(model, prompts_of(rank, num_ranks), num_new_tokens_of(rank))
            for name in PLANS:
                given = seen[rank]["families"][family][name]["answers"]
                assert len(given) == len(expected)
                for (logits, tokens), (expected_logits, expected_tokens) in zip(given, expected, strict=True):
                    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
                    assert torch.equal(tokens, expected_tokens)


@pytest.mark.skipif(instruction_set() is None, reason="torch's own matrix product has other bits for other row counts")
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_an_expert_give_the_same_bits(launch, folders, num_ranks, dtype):
    seen, _ = launch(num_ranks)
    with (model := load(folders["mixtral"], dtype=dtype)).moeflow, torch.no_grad():
        for rank in range(num_ranks):
            assert torch.equal(seen[rank]["few"][str(dtype)], model(few_of(rank)).logits)


def test_tritons_bits_are_those_of_the_whole_call_whatever_rows_meet_on_a_rank(mixtral_folder, tmp_path):
    pytest.importorskip("triton")
    command = [ROOT / "tests" / "helpers" / "parallel_triton.py", mixtral_folder, tmp_path]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    codes, texts = run_ranks(2, command, TRITON_INTERPRET="1", PYTHONPATH=path)
    assert codes == [0, 0], "\n".join(texts)
    for rank in range(2):
        seen = torch.load(tmp_path / f"rank{rank}.pt")
        assert seen["whole"].abs().sum() > 0
        assert torch.equal(seen["spread"], seen["whole"]), f"rank {rank}"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_need_not_be_in_the_same_layer(launch, folders, num_ranks):
    seen, _ = launch(num_ranks)
    with (model := load(folders["mixtral"])).moeflow:
        for rank in range(num_ranks):
            for given, expected in zip(seen[rank]["apart"], own_passes(model, rank), strict=True):
                torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_ranks", "family"), CASES)
def test_a_rank_reads_no_experts_but_its_own(launch, num_ranks, family):
    seen, _ = launch(num_ranks)
    for rank in range(num_ranks):
        for name in PLANS:
            found = seen[rank]["families"][family][name]
            assert found["resident"]
            assert all(rank in found["plan"].experts[layer][expert] for layer, expert in found["resident"])


@pytest.mark.parametrize(("num_ranks", "family"), CASES)
def test_bytes_that_crossed_are_the_plans_assignments_times_the_token(launch, folders, num_ranks, family):
    seen, _ = launch(num_ranks)
    token_bytes = json.loads((folders[family] / "config.json").read_text())["hidden_size"] * 4
    for name in PLANS:
        of_ranks = [one["families"][family][name] for one in seen]
        expected = expected_assignments(of_ranks)
        for found in of_ranks:  # all ranks know the whole
            traffic = found["traffic"]
            assert np.array_equal(traffic.assignments, expected)
            assert np.array_equal(traffic.dispatch_bytes, expected * token_bytes)
            assert np.array_equal(traffic.combine_bytes, expected.transpose(0, 2, 1) * token_bytes)
            header_bytes = 8 * (6 + found["plan"].num_experts)
            assert (traffic.metadata_bytes == traffic.rounds * header_bytes + (traffic.rounds - 1) * 16).all()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_bytes_that_crossed_are_the_cost_models_where_homes_are_equal(launch, num_ranks):
    """Without replicas to the byte; a replicated expert's tokens of one home split to less than a token."""
    seen, _ = launch(num_ranks)
    token_bytes = 64 * 4
    for name in PLANS:
        of_ranks = [one["equal homes"][name] for one in seen]
        load_of = sum(torch.stack([sum(calls) for calls in one["calls"]]) for one in of_ranks).numpy()
        step = StepShape(assignments=load_of[0].sum(), token_bytes=token_bytes, communication="dispatch")
        plan, traffic = of_ranks[0]["plan"], of_ranks[0]["traffic"]
        cost = judge(plan, Workload("calls", load_of), preset("pcie", num_ranks), step)
        num_replicated = (plan.num_replicas > 1).sum(axis=1).max()
        tolerance = token_bytes * num_replicated
        np.testing.assert_allclose(traffic.dispatch_bytes, cost.dispatch_bytes, rtol=1e-12, atol=tolerance)
        crossed = sum(
            (sent.sum() - np.trace(sent.sum(axis=0))) for sent in (traffic.dispatch_bytes, traffic.combine_bytes)
        )
        if not num_replicated:
            assert crossed == pytest.approx(cost.summary()["dispatch_bytes"], rel=1e-12)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_raise_what_one_raises_and_can_go_on(launch, folders, num_ranks):
    seen, _ = launch(num_ranks)
    failures = [one["failures"] for one in seen]
    assert failures[1]["mistake"] == "ValueError: this rank's own mistake"
    assert failures[0]["read"].startswith("ExpertReadError: expert ")
    for rank, found in enumerate(failures):
        if rank != 1:
            assert found["mistake"].startswith("ParallelError: rank 1 failed")
            assert "ValueError: this rank's own mistake" in found["mistake"]
        if rank != 0:
            assert found["read"].startswith("ParallelError: rank 0 failed")
            assert "could not be read" in found["read"]
        assert found["after_mistake"] == found["got_over"] == "nothing"
    with (model := load(folders["mixtral"])).moeflow, torch.no_grad():
        expected = model(torch.arange(1, 12).unsqueeze(0)).logits
    for found in failures:
        torch.testing.assert_close(found["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_raise_when_one_process_ends(launch, num_ranks):
    _, deaths = launch(num_ranks)
    assert len(deaths) == num_ranks - 1
    for found in deaths:
        assert "lost the others" in found["death"]
        assert "A process ended" in found["death"]
        assert "start them again" in found["then"]


def test_a_model_runs_in_one_session_and_never_outside(launch):
    for one in launch(2)[0]:
        assert one["failures"]["outside"].startswith("ConfigError: the model's experts are spread")
        assert one["failures"]["nested"].startswith("ConfigError: a session is open already")


def test_plans_that_do_not_fit_are_refused_on_all_ranks(launch):
    first, second = (one["refusals"] for one in launch(2)[0])
    for refused in (first, second):
        assert "the plan is for 3 GPUs, and 2 ranks run" in refused["ranks"]
        assert "the plan is for 2 layers of 8 experts" in refused["layers"]
        assert "the plan is for 3 layers of 7 experts" in refused["experts"]
        assert refused["no file"].startswith("PlacementError: nowhere.json")
        assert refused["other plan"].startswith("ParallelError: rank ")
        assert refused["predictor"].startswith("ConfigError: the model has a predictor ('markov')")
    assert first["one rank"].startswith("PlacementError: nowhere.json")
    assert second["one rank"].startswith("ParallelError: rank 0 cannot take part: nowhere.json")


def test_nothing_is_leaked(launch):
    for one in launch(2)[0]:
        assert one["leaks"] == {"alive": [], "threads": 0}


def test_processes_must_have_been_started_together(mixtral_folder):
    with (model := load(mixtral_folder)).moeflow, pytest.raises(ConfigError, match="torchrun"):
        apply(model, Plan.of_gpus(1, np.zeros((3, 8), int)))


def test_the_command_line_that_its_errors_show_is_one_it_takes(capsys):
    assert main(["parallel", "MODEL", "PROMPT"]) == 1
    shown = re.search(r"-m moeflow (parallel .*)", capsys.readouterr().err)[1]
    assert "PROMPT" in shown
    assert main(shown.split()) == 1
    assert "is no rank of several" in capsys.readouterr().err


@pytest.mark.parametrize("lossless", [False, True])
def test_the_command_deals_prompts_out_and_prints_from_rank_0(speaking_folder, tmp_path, lossless):
    if lossless:
        model = AutoModelForCausalLM.from_pretrained(speaking_folder, dtype=torch.bfloat16)
        speaking_folder = shutil.copytree(speaking_folder, tmp_path / "bfloat16")
        model.save_pretrained(speaking_folder)
        speaking_folder = pack_model(speaking_folder, tmp_path / "packed", lossless=True).folder
    (tmp_path / "prompts.txt").write_text("hello\nto all\nof you\n")
    write_plan(tmp_path / "plan.json", replicated_plan(2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--prompts", tmp_path / "prompts.txt", "--plan", tmp_path / "plan.json", "--max-new-tokens", 4, "--json")
    codes, (first, second) = run_ranks(
        2, ["-m", "moeflow", "parallel", speaking_folder, *options], MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    assert codes == [0, 0], first + second
    said = json.loads(first.splitlines()[-1])
    assert "{" not in second
    assert [answer["prompt"] for answer in said["answers"]] == ["hello", "to all", "of you"]
    assert [answer["rank"] for answer in said["answers"]] == [0, 1, 0]
    assert sum(map(sum, said["traffic"]["assignments"])) == (5 + 3 + 6 + 3 + 6 + 3) * 2 * 3
    with (model := load(speaking_folder)).moeflow:
        for answer in said["answers"]:
            ids = torch.tensor([[ord(letter) - 32 for letter in answer["prompt"]]])
            tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
            assert answer["text"] == "".join(chr(token + 32) for token in tokens if token < 95)
