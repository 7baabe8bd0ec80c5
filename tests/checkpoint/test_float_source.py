"""Lossless records given back as the bfloat16 records they were made of, and refused where they are damaged."""

import numpy as np
import pytest
import torch

from helpers.lossless_models import foreign, lossless_mixtral
from moeflow.checkpoint.float_source import float_sources, parameters_of
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.checkpoint.store import ExpertStore
from moeflow.convert.pack import pack_model
from moeflow.convert.quantize import quantize_model
from moeflow.core import ExpertKey
from moeflow.errors import ExpertReadError
from moeflow.hf.model_folder import ModelFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16") / "model"
    lossless_mixtral().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    return pack_model(folder, tmp_path_factory.mktemp("packed") / "out", lossless=True).folder


def opened(folder):
    found = ModelFolder(folder)
    return found.expert_files, found.layers(found.empty_model())


def records(files, layers):
    """Read all experts, [num_layers][num_experts]."""
    store, found = ExpertStore(files, layers), []
    for number, source in enumerate(layers):
        found.append([])
        for expert in range(source.layout.num_experts):
            record = np.zeros(source.layout.record_of(expert).num_bytes, np.uint8)
            store.read(ExpertKey(number, expert), record)
            found[-1].append(record)
    store.close()
    return found


def test_records_are_those_of_the_floats(folder, packed):
    files, plain = opened(folder)
    packed_files, stored = opened(packed)
    decoded = float_sources(stored)
    assert [source.layout for source in decoded] == [source.layout for source in plain]
    expected = records(files, plain)
    assert np.array_equal(records(packed_files, decoded), expected)
    for source, layer, exact in zip(stored, records(packed_files, stored), expected, strict=True):
        for expert, record in enumerate(layer):
            found = parameters_of(torch.from_numpy(record), source.layout.record_of(expert))
            assert list(found) == ["gate_up_proj", "down_proj"]
            raw = torch.cat([value.flatten().view(torch.uint8) for value in found.values()])
            assert np.array_equal(raw.numpy(), exact[expert])


def test_other_sources_come_back_as_they_are(folder):
    _, plain = opened(folder)
    assert all(new is old for new, old in zip(float_sources(plain), plain, strict=True))


def escape_far_away(content, places):
    content[places["gate_up_proj_escapes"] + 3] = 127


def test_a_damaged_record_is_refused_by_name(packed, tmp_path):
    damaged = foreign(packed, tmp_path / "foreign", escape_far_away)
    name = "expert 0 of model.layers.0.mlp.experts"
    with pytest.raises(ExpertReadError, match=f"{name}.*escapes"):
        pack_model(damaged, tmp_path / "floats", lossless=False)
    with pytest.raises(ExpertReadError, match=f"{name}.*escapes"):
        quantize_model(damaged, tmp_path / "int8", "int8", method="rtn")


@pytest.mark.parametrize("lossless", [True, False])
def test_a_record_with_another_checksum_is_not_quantised(folder, tmp_path, lossless):
    source = pack_model(folder, tmp_path / "source", lossless=lossless).folder
    content = bytearray((source / PACKED_FILE).read_bytes())
    content[-8192] ^= 1  # in the last expert
    (source / PACKED_FILE).write_bytes(content)
    with pytest.raises(ExpertReadError, match=r"expert 7 of model\.layers\.2\.mlp\.experts is corrupt"):
        quantize_model(source, tmp_path / "int8", "int8", method="rtn")
