"""A GGUF file is compared with the values of its blocks, read another way than moeflow reads them."""

import pytest
import torch

from moeflow.checkpoint.store import ExpertStore
from moeflow.cli.main import main
from moeflow.hf import experts_interface
from moeflow.hf.eager.gguf import GgufWeights
from moeflow.hf.eager.stored_weights import StoredWeights
from moeflow.hf.model_folder import ModelFolder
from moeflow.verify.cost import measure_cost
from moeflow.verify.verify import verify

ROWS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_is_equal_to_the_values_of_its_blocks(dtype, gguf_file):
    found = verify(gguf_file, text=ROWS, dtype=dtype)
    assert found.equal, str(found)
    assert found.independent
    assert (len(found.layers), found.layers[0].rounding) == (2, 0)


def test_a_wrong_block_is_found_at_its_expert(gguf_file, monkeypatch):
    read = StoredWeights.read

    def changed(self, layer, expert):
        values = read(self, layer, expert)
        if (layer, expert) == (1, 3):
            values["down_proj"][5, 7] *= 1 + 1e-6
        return values

    monkeypatch.setattr(StoredWeights, "read", changed)
    found = verify(gguf_file, text=ROWS, dtype="float32")
    assert [(one.layer, one.expert, one.what) for one in found.findings] == [(1, 3, "weights")]


def test_the_reference_holds_the_bytes_of_one_layer(gguf_file):
    folder = ModelFolder(gguf_file)
    empty = folder.empty_model()
    weights = GgufWeights(folder, empty, torch.float32)
    store = ExpertStore(folder.expert_files, folder.layers(empty), stamps=folder.expert_stamps)
    own = StoredWeights(store, torch.float32, experts_interface.transposed(empty))
    for layer, expert in ((0, 0), (0, 5), (1, 2)):
        wanted = weights.read(layer, expert)
        assert all(torch.equal(own.read(layer, expert)[name], value) for name, value in wanted.items())
        assert sorted(weights._held) == [f"blk.{layer}.ffn_{name}_exps.weight" for name in ("down", "gate", "up")]
    own.close()


def test_a_file_costs_nothing_against_itself(gguf_file):
    cost = measure_cost(gguf_file, gguf_file, text=ROWS, dtype="float32")
    assert cost.divergence < 1e-8
    assert cost.top1 == 1


def test_the_command_takes_a_file(gguf_file, capsys):
    assert main(["verify", str(gguf_file), "--tokens", "32"]) == 0
    assert capsys.readouterr().out.startswith("equal: ")
