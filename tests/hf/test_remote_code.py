"""A checkpoint's own Python: never run unless the caller said so, whatever is piped into a command."""

import ast
import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from helpers.paths import ROOT
from helpers.small_tokenizers import letter_tokenizer
from moeflow import load_moe
from moeflow.cli.main import main
from moeflow.errors import UnsupportedModelError
from moeflow.hf import pretrained

_CODE = """
from pathlib import Path
from transformers import MixtralConfig, MixtralForCausalLM
Path({marker!r}).write_text("ran")
class OwnConfig(MixtralConfig):
    model_type = "own"
class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(mixtral, tmp_path):
    """A folder whose config and model are classes of its own, and the file that its code writes when it runs."""
    folder, marker = tmp_path / "own", tmp_path / "ran"
    mixtral.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(_CODE.format(marker=str(marker)))
    weights = {name: value.contiguous() for name, value in mixtral.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    letter_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}a:").save_pretrained(folder)
    return folder, marker


@pytest.mark.parametrize("command", ["info", "generate", "chat", "batch", "pack", "quantize", "trace record"])
def test_a_piped_yes_is_no_permission(own, command, tmp_path, monkeypatch, capfd):
    folder, marker = own
    (tmp_path / "in.jsonl").write_text('{"prompt": "yes"}\n')
    files = {
        "batch": ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")],
        "pack": [str(tmp_path / "out")],
        "quantize": [str(tmp_path / "out"), "--bits", "4"],
        "trace record": ["--prompts", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")],
    }
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\ny\nyes\n"))
    assert main([*command.split(), str(folder), *files.get(command, [])]) == 1
    said = capfd.readouterr()
    assert not marker.exists(), "the checkpoint's Python ran"
    assert "[y/N]" not in said.out + said.err
    assert "trust_remote_code=True" in said.err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["info", "chat"])
def test_neither_is_it_one_in_a_process_of_its_own(own, name):
    folder, marker = own
    command = [sys.executable, "-m", "moeflow", name, str(folder)]
    done = subprocess.run(command, input="y\nyes\n", capture_output=True, text=True, cwd=ROOT)
    assert not marker.exists()
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_with_permission_the_own_classes_run_with_the_same_bits(own, mixtral_folder):
    folder, marker = own
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        load_moe(folder)
    assert not marker.exists()
    ids, found = torch.arange(1, 9)[None], []
    for source, options in ((folder, {"trust_remote_code": True}), (mixtral_folder, {})):
        model = load_moe(source, expert_memory="50%", **options)
        with model.moeflow, torch.no_grad():
            found.append(model(ids).logits)
    assert marker.exists()
    assert torch.equal(*found)


def test_with_permission_a_folder_loads_whose_python_is_only_a_causal_model(own, mixtral_folder):
    folder, marker = own
    file = folder / "config.json"
    names = {"model_type": "mixtral", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **names}))
    code = folder / "modeling_own.py"
    code.write_text(code.read_text().replace("config_class = OwnConfig", "config_class = MixtralConfig"))
    ids, found, ran = torch.arange(1, 9)[None], [], []
    for source, options in ((mixtral_folder, {}), (folder, {}), (folder, {"trust_remote_code": True})):
        model = load_moe(source, expert_memory="50%", **options)
        with model.moeflow, torch.no_grad():
            found.append(model(ids).logits)
        ran.append((marker.exists(), type(model).__name__))
    assert ran == [(False, "MixtralForCausalLM"), (False, "MixtralForCausalLM"), (True, "OwnForCausalLM")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_a_tokenizer_with_python_of_its_own_is_refused(own):
    folder, marker = own
    file = folder / "tokenizer_config.json"
    own_class = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own_class}))
    with pytest.raises(UnsupportedModelError, match="tokenizer of"):
        pretrained.load_tokenizer(folder)
    assert not marker.exists()


def test_every_call_to_transformers_says_whether_code_may_run():
    """Left open, transformers asks on standard input."""
    for file in (ROOT / "moeflow").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"from_pretrained", "from_config"}:
                names = {keyword.arg for keyword in node.keywords}
                assert names & {"trust_remote_code", None}, f"{file.name}:{node.lineno} leaves it to the user's input"
