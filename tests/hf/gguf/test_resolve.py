"""Where a GGUF file is chosen: of a folder, of the hub, with a config of its own; the same from the command line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from helpers.gguf_models import write_model
from helpers.hub_server import ID, hub
from helpers.paths import ROOT
from moeflow import load_moe
from moeflow.cli.main import main
from moeflow.errors import ConfigError, ModelSourceError
from moeflow.hf.pretrained import resolve_folder

PROMPT = torch.arange(5, 12)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with two GGUF models, the second in a folder of its own; and the second's logits."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "Q8_0").mkdir()
    for seed, name in enumerate(("m-F32.gguf", "Q8_0/m-Q8_0.gguf")):
        kind = name[2:-5].rpartition("-")[2]
        write(folder / name, seed, kind)
    (folder / "mmproj-m.gguf").write_bytes(b"an encoder")
    return folder


def write(path, seed, kind):
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2, vocab_size=300, mlp_only_layers=[],
        norm_topk_prob=True, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip

    def type_of(name, shape):
        return kind if len(shape) > 1 and "gate_inp" not in name else "F32"

    write_model(path, "qwen3moe", transformers.Qwen3MoeForCausalLM(config).eval(), type_of)


def logits(source, **options):
    loaded = load_moe(source, device="cpu", dtype="float32", **options)
    with loaded.moeflow, torch.no_grad():
        return loaded(PROMPT).logits


@pytest.fixture
def served(model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    with hub({path.relative_to(model).as_posix(): path for path in model.rglob("*.gguf")}) as found:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield found


@pytest.mark.parametrize("name", ["m-F32.gguf", "Q8_0/m-Q8_0.gguf"])
def test_a_chosen_file_is_the_same_model_by_path_folder_and_hub(model, served, name):
    expected = logits(model / name)
    assert torch.equal(logits(model, gguf_file=name), expected)
    assert torch.equal(logits(ID, gguf_file=name), expected)
    assert {request.name for request in served.requests if request.host == "other"} == {name}
    assert torch.equal(logits(ID, gguf_file=name, local_files_only=True), expected)


def test_several_models_are_listed_and_one_is_taken(model, tmp_path):
    shutil.copy(model / "m-F32.gguf", tmp_path / "a.gguf")
    shutil.copy(model / "mmproj-m.gguf", tmp_path)
    assert torch.equal(logits(tmp_path), logits(model / "m-F32.gguf"))
    shutil.copy(model / "Q8_0/m-Q8_0.gguf", tmp_path / "b.gguf")
    with pytest.raises(ModelSourceError, match=r"2 GGUF models: a.gguf \(302 KiB\), b.gguf \(86 KiB\)\. Choose"):
        load_moe(tmp_path)
    with pytest.raises(ModelSourceError, match=r"has no GGUF file 'c.gguf'. It has a.gguf"):
        load_moe(tmp_path, gguf_file="c.gguf")
    with pytest.raises(ConfigError, match="is a file itself"):
        load_moe(tmp_path / "a.gguf", gguf_file="a.gguf")
    with pytest.raises(ConfigError, match="gguf_file is 7"):
        load_moe(tmp_path, gguf_file=7)


def changed_config(model, folder):
    """Write a config.json of the model with one expert a token."""
    folder.mkdir(exist_ok=True)
    fields = json.loads((resolve_folder(model / "m-F32.gguf") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": 1}))
    return folder


def test_a_config_wins_over_the_file_from_a_folder_or_the_hub(model, served, tmp_path):
    folder = changed_config(model, tmp_path / "own")
    expected = logits(model / "m-F32.gguf", num_experts_per_tok=1)
    assert not torch.equal(expected, logits(model / "m-F32.gguf"))
    assert torch.equal(logits(model / "m-F32.gguf", config=folder), expected)
    assert torch.equal(logits(model, gguf_file="m-F32.gguf", config=str(folder)), expected)
    served.files = {"config.json": folder / "config.json", "model.safetensors": b"weights that are not fetched"}
    assert torch.equal(logits(model / "m-F32.gguf", config=ID), expected)
    assert {request.name for request in served.requests if request.host != "api"} == {"config.json"}
    with pytest.raises(ModelSourceError, match="is no folder"):
        load_moe(model / "m-F32.gguf", config=str(tmp_path / "none"))


def test_a_repository_s_config_holds_for_files_in_its_folders(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    changed_config(model, tmp_path / "model")
    found = resolve_folder(tmp_path / "model", gguf_file="Q8_0/m-Q8_0.gguf")
    assert json.loads((found / "config.json").read_text())["num_experts_per_tok"] == 1


def test_the_command_line_chooses_too(model, tmp_path, capsys):
    folder = changed_config(model, tmp_path / "own")
    assert main(["info", str(model), "--gguf-file", "m-F32.gguf", "--config", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_experts_per_tok"] == 1
    assert main(["info", str(model), "--gguf-file", "none.gguf"]) == 1
    assert "has no GGUF file 'none.gguf'" in capsys.readouterr().err
    assert main(["info", "--gguf-file", "m-F32.gguf"]) == 1
    assert "are about a model: name it" in capsys.readouterr().err
    (folder / "model.safetensors").touch()
    assert main(["info", str(folder), "--config", str(folder)]) == 1
    assert "--config is for GGUF files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hub_s_file_answers_on_the_command_line(model, tmp_path):
    with hub({path.relative_to(model).as_posix(): path for path in model.rglob("*.gguf")}) as served:
        environment = os.environ | {"HF_ENDPOINT": served.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
        command = [sys.executable, "-m", "moeflow", "generate", ID, "ab", "--max-new-tokens", "3"]
        command += ["--gguf-file", "m-F32.gguf", "--step", "python"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert run.returncode == 0, run.stderr
