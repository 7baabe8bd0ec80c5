"""A model on disk: what is decided about it once, and by whom it is carried."""

import json
import os
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.cli.main import main
from moeflow.convert.pack import pack_model
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.hf import pretrained
from moeflow.hf.model_folder import ModelFolder
from moeflow.loading.describe import describe_model

PROMPT = torch.arange(1, 12).unsqueeze(0)
SHARED = {"num_hidden_layers": 1, "num_local_experts": 4}


def save(folder, dtype, **options):
    """Save a model whose config.json says nothing of its dtype."""
    tiny_mixtral(**SHARED).to(dtype).save_pretrained(folder, **options)
    edit(folder / "config.json", lambda config: config.pop("dtype"))
    return folder


def edit(file, change):
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def logits(folder):
    model = load_moe(folder)
    with torch.no_grad():
        found = model(PROMPT).logits
    model.moeflow.close()
    return found


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}], ids=["one file", "shards"])
def test_a_dtype_that_the_config_does_not_name_is_the_weights(options, tmp_path):
    folder = save(tmp_path / "model", torch.bfloat16, **options)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    about = describe_model(folder)
    assert (about["dtype"], about["expert_bytes"]) == ("BF16", 3 * 64 * 96 * 2)
    packed = pack_model(folder, tmp_path / "packed", lossless=False).folder
    assert describe_model(packed)["expert_bytes"] == about["expert_bytes"]
    assert logits(folder).dtype == torch.bfloat16
    assert torch.equal(logits(packed), logits(folder))


def test_a_packed_folder_keeps_the_dtype_that_was_decided_before(tmp_path):
    """The first tensor of the shards is an expert's; without it the packed folder's dense weights would say float32."""
    folder = save(tmp_path / "model", torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["a.buffer.of.no.use"] = torch.zeros(1, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert ModelFolder(folder).dtype == torch.float16
    packed = pack_model(folder, tmp_path / "packed").folder
    dense = load_file(packed / "model.safetensors")
    del dense["a.buffer.of.no.use"]
    save_file(dense, packed / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(packed), logits(folder))


def test_an_index_may_name_the_dtype(tmp_path):
    folder = save(tmp_path / "model", torch.float32, max_shard_size="30KB")
    edit(folder / "model.safetensors.index.json", lambda index: index["metadata"].update(dtype="float16"))
    assert ModelFolder(folder).dtype == torch.float16
    edit(folder / "model.safetensors.index.json", lambda index: index["metadata"].update(dtype="no such"))
    assert ModelFolder(folder).dtype == torch.float32


def test_a_relative_folder_outlives_a_change_of_directory(mixtral_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(mixtral_folder.parent)
    model, expected = load_moe(mixtral_folder.name, expert_memory="40%"), logits(mixtral_folder)
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, expected)
    model.moeflow.close()


@pytest.mark.parametrize("packed", [False, True])
def test_shards_that_are_replaced_after_loading_are_not_mixed_with_the_new(packed, tmp_path):
    folder, other = save(tmp_path / "model", torch.float32), save(tmp_path / "other", torch.float32)
    if packed:
        folder, other = (
            pack_model(folder, tmp_path / "packed").folder,
            pack_model(other, tmp_path / "other packed").folder,
        )
    model, expected = load_moe(folder, expert_memory="75%"), logits(folder)
    for file in other.iterdir():
        os.replace(file, folder / file.name)
    with torch.no_grad():
        assert torch.equal(model(PROMPT).logits, expected)
    model.moeflow.close()


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_changes_while_the_model_is_opened_is_named(packed, tmp_path):
    folder = save(tmp_path / "model", torch.float32)
    folder = pack_model(folder, tmp_path / "packed").folder if packed else folder
    opened, file = ModelFolder(folder), folder / "model.safetensors"
    for change, match in ((os.utime, "changed on disk while it was opened"), (os.unlink, "is gone")):
        with pytest.raises(CheckpointError, match=re.escape(str(file)) + f" {match}"):
            pretrained.load_without_experts(opened.checkpoint, opened.config, lambda empty, change=change: change(file))


def test_shards_that_are_links_out_of_the_folder_are_named_and_those_of_a_hub_cache_are_not(tmp_path, capsys):
    for folder, named in ((tmp_path / "model", True), (tmp_path / "models--o--n" / "snapshots" / "1f", False)):
        save(folder, torch.float32)
        blob = folder.parent.parent / "blobs" / f"weights of {folder.name}"
        blob.parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(blob)
        (folder / "model.safetensors").symlink_to(blob)
        assert describe_model(folder)["links_out"] == ({"model.safetensors": str(blob)} if named else {})
        assert main(["info", str(folder)]) == 0
        assert ("link out" in capsys.readouterr().out) == named
        logits(folder)


@pytest.mark.parametrize("architecture", ["MixtralForSequenceClassification", "MixtralModel"])
def test_a_checkpoint_with_another_head_is_named_by_what_it_is(architecture, tmp_path):
    getattr(transformers, architecture)(tiny_mixtral(**SHARED).config).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError,
        match=rf"checkpoint of {architecture} and has no lm_head.weight, which load_moe's MixtralForCausalLM needs",
    ):
        load_moe(tmp_path)


def test_a_relative_folder_is_read_after_a_chdir(mixtral_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(mixtral_folder.parent)
    folder = ModelFolder(mixtral_folder.name)
    monkeypatch.chdir(tmp_path)
    assert folder.config.model_type == "mixtral"
    assert folder.checkpoint.tensors
