"""Routes of a model in a GGUF file are recorded, and predictors learn from them."""

import json

import torch

from moeflow import load_moe
from moeflow.cli.main import main
from moeflow.hf.gguf.resolve import gguf_folder_of
from moeflow.trace.trace import RoutingTrace


def test_a_trace_of_a_file_is_recorded_and_learnt_from(gguf_file, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(f"text number {number} ab" for number in range(6)))
    record = ["trace", "record", str(gguf_file), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4"]
    assert main([*record, "-o", str(tmp_path / "t.trace"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == 6
    assert RoutingTrace.open(tmp_path / "t.trace").format.source == f"recorded from {gguf_folder_of(gguf_file)}"
    train = ["predictor", "train", str(tmp_path / "t.trace"), "-o", str(tmp_path / "learnt"), "--kind", "path"]
    assert main(train) == 0
    model = load_moe(gguf_file, device="cpu", predictor=tmp_path / "learnt")
    with model.moeflow:
        model.generate(torch.arange(5, 16)[None], max_new_tokens=4)
        assert model.moeflow.stats()
