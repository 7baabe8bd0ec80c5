"""Programs that outlive their process: found again by the same model, and by no other."""

import os
import subprocess
import sys

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from helpers.forks import in_child
from helpers.paths import ROOT
from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.tensor([[5, 17, 99, 3]])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of this test's own."""
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def load(mixtral_folder):
    made = []

    def load(folder=mixtral_folder, **options):
        made.append(load_moe(folder, device="cpu", expert_memory="100%", predictor=None, **options))
        return made[-1]

    yield load
    for model in made:
        model.moeflow.close()


def answer(model):
    """Logits of a few greedy tokens, and whether the program came from the disk; None where there is none."""
    out = model.generate(
        PROMPT, max_new_tokens=5, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits), model.moeflow.step.programs.was_kept.get(1)


def programs(cache):
    return sorted(path.name for path in (cache / "programs").iterdir())


def test_the_second_load_takes_the_program_from_the_disk_with_the_same_bits(load, cache):
    captured, was_kept = answer(load())
    assert was_kept is False
    found, was_kept = answer(second := load())
    assert was_kept is True
    assert torch.equal(found, captured)
    assert second.moeflow.stats()["step"]["mode"] == "native"
    assert len(programs(cache)) == 1  # no lock, no part of a file


def test_another_copy_of_the_folder_is_the_same_model(load, cache, mixtral, tmp_path):
    answer(load())
    mixtral.save_pretrained(tmp_path / "copy")
    assert answer(load(tmp_path / "copy"))[1] is True


def test_another_model_dtype_or_code_has_a_program_of_its_own(load, cache, tmp_path, monkeypatch):
    answer(load())
    tiny_mixtral(rms_norm_eps=1e-3).save_pretrained(tmp_path / "config")
    assert answer(load(tmp_path / "config"))[1] is False
    assert answer(load(dtype=torch.bfloat16))[1] is False

    scale, own = 2.0, MixtralAttention.forward
    with monkeypatch.context() as patch:
        patch.setattr(MixtralAttention, "forward", lambda *args, **kwargs: (own(*args, **kwargs)[0] * scale, None))
        changed, was_kept = answer(load())
    assert was_kept is False
    own_logits, was_kept = answer(load())
    assert was_kept is True
    assert not torch.equal(changed, own_logits)


def test_a_damaged_file_is_written_anew(load, cache):
    captured, _ = answer(load())
    (path,) = (cache / "programs").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    logits, was_kept = answer(load())
    assert was_kept is False
    assert torch.equal(logits, captured)
    assert path.read_bytes() == whole


def test_why_a_model_has_no_program_is_kept_too(load, cache, monkeypatch):
    own = MixtralAttention.forward

    def looking(self, hidden_states, **kwargs):
        made, weights = own(self, hidden_states, **kwargs)
        return (made * 2 if hidden_states.sum() > 0 else made), weights

    monkeypatch.setattr(MixtralAttention, "forward", looking)
    reasons = []
    for was_kept in (False, True):
        model = load()
        assert answer(model)[1] is was_kept
        assert model.moeflow.step.num_steps == 0
        reasons.append(model.moeflow.stats()["step"]["reason"])
    assert reasons[0] == reasons[1]
    assert "cannot be captured" in reasons[0]


def test_without_a_folder_that_can_be_written_steps_run_natively_all_the_same(load, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        model = load()
        assert answer(model)[1] is False
        assert model.moeflow.step.num_steps == 4


def test_only_the_latest_files_are_kept(load, cache):
    folder = cache / "programs"
    folder.mkdir(parents=True)
    for number in range(300):
        (folder / f"{number:032}.json").touch()
        os.utime(folder / f"{number:032}.json", (number, number))
    answer(load())
    assert len(programs(cache)) == 256
    assert programs(cache)[0] == f"{45:032}.json"
    assert answer(load())[1] is True


def test_an_interrupted_capture_is_tried_again(load, cache, monkeypatch):
    own, left = MixtralAttention.forward, ["an interrupt"]

    def interrupted(*args, **kwargs):
        if left and torch.compiler.is_compiling():
            left.clear()
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(MixtralAttention, "forward", interrupted)
    model = load()
    with pytest.raises(KeyboardInterrupt):
        answer(model)
    logits, was_kept = answer(model)
    assert was_kept is False
    assert model.moeflow.step.num_steps == 4
    monkeypatch.undo()
    assert torch.equal(logits, answer(load())[0])


def test_a_hook_at_the_first_step_keeps_it_from_being_captured(load, cache):
    model = load()
    hook = model.model.norm.register_forward_hook(lambda module, args, output: output * 0)
    assert answer(model)[1] is None
    hook.remove()
    logits, was_kept = answer(model)
    assert was_kept is False
    assert torch.equal(logits, answer(load())[0])


@pytest.mark.slow
def test_processes_that_write_at_once_leave_one_whole_file(load, cache, mixtral_folder):
    program = f"""
import torch
from moeflow import load_moe
with (model := load_moe({str(mixtral_folder)!r}, device="cpu", expert_memory="100%", predictor=None)).moeflow:
    model.generate(torch.tensor([[5, 17]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert model.moeflow.step.num_steps == 3
"""
    started = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(programs(cache)) == 1
    assert answer(load())[1] is True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_writes_and_reads_like_any_process(load, cache, mixtral_folder):
    def captures():
        assert answer(load())[1] is False

    assert in_child(captures) == 0
    assert answer(load())[1] is True
