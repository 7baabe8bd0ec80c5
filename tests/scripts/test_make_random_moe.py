"""A random checkpoint is one that transformers and load_moe read, written in memory that its size does not change."""

import tracemalloc

import pytest
import torch
from transformers import AutoModelForCausalLM

import make_random_moe
from make_random_moe import Shape, write_random_moe
from moeflow import load_moe
from moeflow.errors import ConfigError

TINY = Shape(2, 8, 2, 64, 32, 4, 2, 16, 128, 256)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def test_transformers_and_load_moe_read_the_same_model(tmp_path):
    assert write_random_moe(tmp_path, TINY)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    ids = torch.arange(1, 20)[None]
    model = load_moe(tmp_path, device="cpu", expert_memory="50%", predictor=None)
    with torch.no_grad(), model.moeflow:
        expected, found = eager(ids).logits, model(ids).logits
    assert torch.isfinite(expected).all()
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    assert sum(map(len, contents(tmp_path).values())) - TINY.num_bytes < 50_000


def test_the_same_options_give_the_same_bytes_by_any_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(make_random_moe, "_PIECE_VALUES", 300)  # tensors of several pieces
    for name, threads, seed in (("a", 1, 0), ("b", 5, 0), ("c", 5, 1)):
        write_random_moe(tmp_path / name, TINY, seed=seed, threads=threads)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


def test_memory_does_not_grow_with_a_layer(tmp_path):
    def peak(experts):
        shape = TINY._replace(layers=1, experts=experts, hidden=256, inner=256)
        tracemalloc.start()
        write_random_moe(tmp_path / str(experts), shape, threads=1)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)  # imports
    assert peak(64) - peak(8) < 256 * 256 * 2 * 3 * 8  # 56 more experts, not even eight of them


def test_a_finished_folder_is_left_and_one_that_was_cut_is_finished(tmp_path, monkeypatch):
    write_random_moe(tmp_path / "whole", TINY)
    assert not write_random_moe(tmp_path / "whole", TINY)
    config = Shape.config

    def killed(self):
        raise RuntimeError("killed")

    monkeypatch.setattr(Shape, "config", killed)
    with pytest.raises(RuntimeError, match="killed"):
        write_random_moe(tmp_path / "cut", TINY)
    first, second, _ = sorted((tmp_path / "cut").glob("*.safetensors"))
    first.unlink()
    kept = second.stat().st_mtime_ns
    monkeypatch.setattr(Shape, "config", config)
    assert write_random_moe(tmp_path / "cut", TINY)
    assert second.stat().st_mtime_ns == kept
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert {file.name for file in (tmp_path / "cut").iterdir() if not file.name.endswith(".lock")} == {
        file.name for file in (tmp_path / "whole").iterdir() if not file.name.endswith(".lock")
    }


def test_another_folder_and_sizes_of_no_model_are_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds mine\.txt"):
        write_random_moe(tmp_path, TINY)
    for wrong in ({"top_k": 9}, {"heads": 3}, {"layers": 0}):
        with pytest.raises(ConfigError, match="no model's"):
            write_random_moe(tmp_path / "out", TINY._replace(**wrong))
    with pytest.raises(ConfigError, match="GB free"):
        write_random_moe(tmp_path / "out", TINY._replace(vocab=1 << 40))
    assert make_random_moe.main([str(tmp_path), "--layers", "1"]) == 1
    assert "mine.txt" in capsys.readouterr().err
