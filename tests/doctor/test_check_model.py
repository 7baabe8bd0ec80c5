"""All of a model is read: every fault of damaged files is named, in one run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeflow.checkpoint.packed_file import PACKED_FILE, packed_layers
from moeflow.convert.pack import pack_model
from moeflow.doctor.check_model import check_model
from moeflow.doctor.finding import BROKEN, FINE, works
from moeflow.doctor.model import shards
from moeflow.doctor.model.shards import check_shards, check_values

EXPERT = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
DENSE = "model.layers.2.self_attn.q_proj.weight"


def check(folder):
    """Return what was found, and the shares that were told."""
    told = []
    return check_model(folder, lambda share, text: told.append(share)), told


def broken(found, name=None):
    return [f"{one.found} {one.wrong}" for one in found if one.level == BROKEN and name in (None, one.name)]


def change(folder, name, values):
    """Write other values into a tensor of a checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(key for key in index if key == name or key.endswith(name))
    file = folder / index[name]
    tensors = load_file(file)
    tensors[name].view(-1)[: len(values)] = torch.tensor(values, dtype=tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    return name, file.name


@pytest.fixture
def folder(speaking_folder, tmp_path):
    return shutil.copytree(speaking_folder, tmp_path / "model")


@pytest.fixture
def packed(speaking_folder, tmp_path):
    pack_model(speaking_folder, tmp_path / "packed")
    return tmp_path / "packed"


def test_a_model_that_is_well_is_read_and_tried(folder):
    found, told = check(folder)
    assert works(found)
    levels = {one.name: one.level for one in found}
    assert levels == dict.fromkeys(("config", "shards", "values", "tokenizer", "chat template", "trial"), FINE)
    assert told == sorted(told)
    assert told[-1] == 1


def test_a_packed_model_that_is_well_is_read_and_tried(packed):
    found, _ = check(packed)
    assert works(found)
    assert {one.name for one in found} >= {"packed file", "values", "trial"}


def test_every_fault_is_named_not_the_first_alone(folder):
    expert, of_expert = change(folder, EXPERT, [torch.nan, torch.inf, torch.nan])
    dense, of_dense = change(folder, DENSE, [-torch.inf])
    others = sorted({file.name for file in folder.glob("*.safetensors")} - {of_expert, of_dense})
    short, gone, long = others[:3]
    (folder / short).write_bytes((folder / short).read_bytes()[:-7])
    (folder / gone).unlink()
    (folder / long).write_bytes((folder / long).read_bytes() + b"more")
    (folder / "tokenizer.json").write_text("{")
    found, _ = check(folder)
    told = broken(found)
    for parts in (
        (of_expert, "layer 1, expert 5", expert, "2 NaN and 1 infinite"), (of_dense, "layer 2", dense, "1 infinite"),
        (short, "truncated"), (gone, "missing"), (long, "4 bytes behind"), ("tokenizer",),
    ):  # fmt: skip
        assert sum(all(part in line for part in parts) for line in told) == 1, (parts, told)
    assert len(told) == 6
    assert "trial" not in {one.name for one in found}


def test_an_index_that_is_of_other_shards_names_each_tensor(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    (first, second), extra = sorted(index["weight_map"])[:2], "model.layers.9.mlp.weight"
    index["weight_map"][extra] = index["weight_map"][first]
    moved = next(name for name in set(index["weight_map"].values()) if name != index["weight_map"][second])
    index["weight_map"][second] = moved
    file.write_text(json.dumps(index))
    told = broken(check(folder)[0], "index")
    assert len(told) == 2
    assert all(any(name in line for line in told) for name in (extra, second))


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "mixtral", "hidden_size": "many"}'])
def test_the_files_are_read_though_there_is_no_config(folder, content):
    (folder / "config.json").unlink() if content is None else (folder / "config.json").write_text(content)
    change(folder, EXPERT, [torch.nan])
    found, _ = check(folder)
    assert len(broken(found, "config")) == len(broken(found, "values")) == 1


def test_a_folder_without_weights_is_told_once(tmp_path):
    found = []
    assert check_shards(tmp_path, found).tensors == {}
    assert [one.level for one in found] == [BROKEN]


def test_files_that_no_index_names_are_told(folder):
    shutil.copy(next(folder.glob("*.safetensors")), folder / "old.safetensors")
    found = []
    check_shards(folder, found)
    assert "old.safetensors" in next(one.found for one in found if one.level != FINE)


def test_each_expert_of_a_packed_file_that_differs_is_named(packed):
    layers = packed_layers(packed)
    content = bytearray((packed / PACKED_FILE).read_bytes())
    for layer, expert in ((0, 3), (2, 7)):
        content[layers[layer].copies[0][0].begins[expert] + 11] ^= 4
    (packed / PACKED_FILE).write_bytes(content)
    told = broken(check(packed)[0], "packed expert")
    assert len(told) == 2
    for line, layer, expert in zip(told, (0, 2), (3, 7), strict=True):
        assert f"layers.{layer}." in line
        assert f"expert {expert}" in line
        assert "checksum" in line


def test_nan_in_a_packed_expert_whose_checksum_agrees_is_named(folder, tmp_path):
    change(folder, EXPERT, [torch.nan])
    pack_model(folder, tmp_path / "packed")
    (line,) = broken(check(tmp_path / "packed")[0], "values")
    assert "layers.1." in line
    assert "expert 5, gate_up_proj: 1 NaN" in line


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no" + content])
def test_a_packed_file_that_is_none_is_told(packed, damage):
    file = packed / PACKED_FILE
    file.write_bytes(damage(file.read_bytes()))
    found, _ = check(packed)
    assert len(broken(found, "packed file")) == 1
    assert "trial" not in {one.name for one in found}


def test_an_expert_of_a_stacked_tensor_is_told_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_PIECE_BYTES", 1 << 10)  # an expert lies in several pieces, a piece in two experts
    values = torch.randn(5, 24, 33)
    values[3, 1, 2], values[3, 23, 32], values[4, 0, 0] = torch.nan, torch.nan, torch.inf
    scales = torch.ones(5, 4, 4, dtype=torch.uint8)
    scales[1, 2, 3] = 255
    tensors = {"model.layers.7.mlp.experts.down_proj": values, "model.layers.7.mlp.experts.down_proj_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    found = []
    check_values(check_shards(tmp_path, found), found, lambda count: None)
    told = broken(found)
    assert len(told) == 3
    for line, parts in zip(
        sorted(told), (("expert 1", "1 NaN"), ("expert 3", "2 NaN"), ("expert 4", "1 infinite")), strict=True
    ):
        assert all(part in line for part in ("layer 7", *parts))


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    import tracemalloc

    save_file({"a": torch.zeros(20_000_000), "b": torch.zeros(20_000_000)}, tmp_path / "model.safetensors")
    found = []
    read = check_shards(tmp_path, found)
    tracemalloc.start()  # numpy tells it of its arrays
    check_values(read, found, lambda count: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert works(found)
    assert peak < 100e6 < read.num_bytes


@pytest.mark.parametrize(
    ("template", "said"),
    [("{{ raise_exception('no') }}", "it fails"), ("{% for %}", "it fails"), ("always the same", "it fails")],
)
def test_a_chat_template_that_fails_is_told(folder, template, said):
    (folder / "chat_template.jinja").write_text(template)
    assert said in broken(check(folder)[0], "chat template")[0]


def test_a_model_without_a_chat_template_works(folder):
    (folder / "chat_template.jinja").unlink()
    found, _ = check(folder)
    assert works(found)
    assert [one.found for one in found if one.name == "chat template"] == ["none"]


def test_a_tokenizer_of_another_model_is_told(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    assert "of another model" in broken(check(folder)[0], "tokenizer")[0]


def test_a_model_that_answers_nan_is_told(folder):
    change(folder, "model.norm.weight", [torch.nan])
    found, _ = check(folder)
    assert "logits" in broken(found, "trial")[0]


def test_a_model_that_does_not_fit_is_not_tried(folder, monkeypatch):
    monkeypatch.setattr("moeflow.doctor.model.trial.available_memory_bytes", lambda: 1000)
    found, _ = check(folder)
    assert works(found)
    assert next(one.found for one in found if one.name == "trial") == "not run"
