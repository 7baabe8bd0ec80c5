"""Sizes and plans of a GGUF file, from its headers."""

import json

import pytest
import torch

from helpers.gguf_models import write_model
from helpers.hub_server import ID, hub, lead_to
from helpers.machine_profiles import small_profile
from helpers.small_gguf import small_model, type_of
from moeflow import load_moe
from moeflow.checkpoint.gguf.file import GGUF_FILE
from moeflow.cli.fit import commands_for
from moeflow.cli.main import main
from moeflow.errors import ModelSourceError
from moeflow.fit.fit import survey
from moeflow.fit.formats import kernel_of
from moeflow.fit.source import model_source
from moeflow.hf import experts_interface
from moeflow.hf.gguf.resolve import gguf_folder_of
from moeflow.hf.model_folder import ModelFolder
from moeflow.loading.budget import ExpertsSize
from moeflow.machine.identity import disk_of, hardware
from moeflow.machine.store import keep_profile


def test_sizes_are_those_of_the_model_that_is_loaded(gguf_file):
    for path in (gguf_file, gguf_file.parent):
        with model_source(path, print) as (sizes, disk):
            form = sizes.published
    folder = ModelFolder(gguf_file)
    empty = folder.empty_model()
    layouts = [source.layout for source in folder.layers(empty)]
    size = ExpertsSize.of(layouts, experts_interface.num_experts_per_tok(empty))
    assert disk == gguf_file.parent
    assert (sizes.num_experts, sizes.top_k, sizes.slot_bytes(form), sizes.experts_bytes(form)) == (
        size.num_experts, size.num_experts_per_tok, size.slot_bytes, size.all_bytes,
    )  # fmt: skip
    assert form.name == "as published (q4_k, q6_k)"
    assert sizes.file_bytes(form) == sum(entry.num_bytes for entry in folder.checkpoint.tensors.values())


def test_gate_and_up_of_two_types_take_the_bytes_of_floats(tmp_path):
    def mixed(name, shape):
        return "Q5_K" if "ffn_up_exps" in name else type_of(name, shape)

    write_model(tmp_path / "mixed.gguf", "qwen3moe", small_model(), mixed)
    with model_source(tmp_path / "mixed.gguf", print) as (sizes, _):
        form = sizes.published
    folder = ModelFolder(tmp_path / "mixed.gguf")
    layouts = [source.layout for source in folder.layers(folder.empty_model())]
    assert sizes.experts_bytes(form) == ExpertsSize.of(layouts, 2).all_bytes
    assert form.kernel == kernel_of(layouts) == "float32"
    assert sizes.file_bytes(form) == sum(entry.num_bytes for entry in folder.checkpoint.tensors.values())


def test_dense_weights_are_planned_with_the_bytes_that_they_take(gguf_file):
    model = load_moe(gguf_file, device="cpu", predictor=None)
    with model.moeflow, model_source(gguf_file, print) as (sizes, _):
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert sizes.dense_bytes == pytest.approx(sum(held.values()), rel=0.01)


def test_a_plan_of_a_file_is_obeyed(gguf_file, tmp_path, monkeypatch, capsys):
    (folder := tmp_path / "cache").mkdir()
    monkeypatch.setenv("MOEFLOW_CACHE", str(folder))
    keep_profile(small_profile(hardware=hardware(), disk=disk_of(gguf_file.parent)))
    assert main(["fit", str(gguf_file), "--memory", "6GB", "--json", "-o", str(tmp_path / "plan")]) == 0
    about = json.loads(capsys.readouterr().out)
    assert {row["format"] for row in about["rows"]} == {"as published (q4_k, q6_k)"}
    assert about["plan"]["stored"] == "q4_k"
    model = load_moe(gguf_file, plan=tmp_path / "plan")
    with model.moeflow as runtime:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
        lines = runtime.stats()["plan"]["lines"]
    for name in ("dense", "experts"):
        assert 0 < lines[name]["actual_bytes"] <= 1.02 * lines[name]["planned_bytes"], name


def test_the_nearest_measured_kernel_stands_for_a_type(gguf_file):
    slow, fast = ({"bf16": {1: rate}, "int4-g64": {1: rate / 2}} for rate in (1e9, 4e9))
    flops = {"bf16": 5e10, "int4-g64": 5e10}
    rates = [
        survey(gguf_file, memory="6GB", profile=small_profile(kernel_read=read, kernel_flops=flops)).rows[-1]
        for read in (slow, fast)
    ]
    assert rates[0].decode_tok_s.mid < rates[1].decode_tok_s.mid


def test_the_small_folder_stands_for_its_file(gguf_file):
    folder = gguf_folder_of(gguf_file)
    assert (folder / GGUF_FILE).is_file()
    with model_source(folder, print) as (sizes, disk):
        assert disk == gguf_file.parent
        assert sizes.published.kernel == "q4_k"


def test_a_file_of_the_hub_is_planned_from_its_headers_and_leaves_nothing(gguf_file, tmp_path, monkeypatch):
    profile = small_profile()
    with hub({"small-Q4_K_M.gguf": gguf_file, "README.md": b"two"}) as served:
        lead_to(served, monkeypatch, tmp_path / "hub")
        monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))
        found = survey(ID, gguf_file="small-Q4_K_M.gguf", memory="6GB", profile=profile)
        with pytest.raises(ModelSourceError, match=r"no GGUF file 'other.gguf'. It has small-Q4_K_M.gguf"):
            survey(ID, gguf_file="other.gguf", memory="6GB", profile=profile)
    expected = survey(gguf_file, memory="6GB", profile=profile)
    for row, right in zip(found.rows, expected.rows, strict=True):
        assert row.lines | {"process": 0} == right.lines | {"process": 0}
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir() and "Q4_K_M" in path.name]
    chat, load = commands_for(found)
    assert "chat org/model --gguf-file small-Q4_K_M.gguf --device cpu" in chat
    assert "load_moe('org/model', gguf_file='small-Q4_K_M.gguf', device='cpu'" in load


def test_the_command_fetches_no_tensor_of_a_hubs_file(gguf_file, tmp_path, monkeypatch, capsys):
    (folder := tmp_path / "cache").mkdir()
    monkeypatch.setenv("MOEFLOW_CACHE", str(folder))
    keep_profile(small_profile(hardware=hardware(), disk=disk_of(folder)))
    with hub({"small.gguf": gguf_file}) as served:
        lead_to(served, monkeypatch, tmp_path / "hub")
        assert main(["fit", ID, "--gguf-file", "small.gguf", "--memory", "6GB", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["model"] == ID
    assert not list((tmp_path / "hub").rglob("*.gguf"))


def test_one_of_several_files_of_a_folder_is_planned(gguf_file, tmp_path):
    for name in ("one.gguf", "other.gguf"):
        (tmp_path / name).write_bytes(gguf_file.read_bytes())
    found = survey(tmp_path, gguf_file="other.gguf", memory="6GB", profile=small_profile())
    assert "gguf_file='other.gguf'" in commands_for(found)[1]
