"""Checkpoints of several shards, what quantising them writes, and a hub that serves them."""

import re

import pytest
import torch

from helpers.hub_server import hub, lead_to
from helpers.sharded_models import reshard, straddling
from helpers.small_models import tiny_mixtral
from helpers.written_folders import content
from moeflow.convert.quantize import quantize_model


def by_layer(name):
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else 4


@pytest.fixture(scope="module")
def model(tmp_path_factory, mixtral_folder):
    """A checkpoint whose five shards share experts."""
    return reshard(mixtral_folder, tmp_path_factory.mktemp("straddling") / "model", straddling)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 38 MB in five shards, a layer in each of four."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    tiny_mixtral(**sizes).to(torch.bfloat16).save_pretrained(folder / "one")
    return reshard(folder / "one", folder / "model", by_layer)


@pytest.fixture(scope="module")
def expected(model, large, tmp_path_factory):
    """What quantising the folders writes: of the first int4 by the default method, of the second int8 by rounding."""
    out = tmp_path_factory.mktemp("expected")
    quantize_model(model, out / "model", "int4")
    quantize_model(large, out / "large", "int8", method="rtn")
    return {name: content(out / name) for name in ("model", "large")}


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Serve a folder as the hub's model until the test ends."""
    served = []

    def begin(folder):
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        served.append(hub(files))
        found = served[-1].__enter__()
        lead_to(found, monkeypatch, tmp_path / "cache")
        return found

    yield begin
    for one in served:
        one.__exit__(None, None, None)
