"""Packing: the same bits from another folder, survives kills and full disks, and every way the file can be bad."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import pytest
import torch

from moeflow import load_moe
from moeflow.checkpoint.packed_file import PACKED_FILE
from moeflow.convert.pack import pack_model
from moeflow.errors import CheckpointError, ConfigError, ExpertReadError, MoeflowError
from moeflow.hf.model_folder import ModelFolder

PROMPT = torch.arange(1, 12).unsqueeze(0)


@pytest.fixture(scope="module")
def packed_folder(mixtral_folder, tmp_path_factory):
    return pack_model(mixtral_folder, tmp_path_factory.mktemp("packed") / "model").folder


def logits(folder, **options):
    model = load_moe(folder, **options)
    with torch.no_grad():
        found = model(PROMPT).logits
    stats = model.moeflow.stats()
    model.moeflow.close()
    return found, stats


def test_packed_model_gives_the_same_bits_in_one_read_an_expert(mixtral_folder, packed_folder):
    expected, _ = logits(mixtral_folder, expert_memory="25%")
    for budget in ("25%", "100%"):
        found, stats = logits(packed_folder, expert_memory=budget)
        assert torch.equal(found, expected)
        assert stats["io"]["reads"] == stats["prefill"]["misses"]
        assert stats["memory"]["staging_bytes"] == 0  # read straight into the slot


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt_oss", "inkling", "ernie4_5_vl_moe", "nemotron_h", "qwen3_vl_moe", "diffusion_gemma"]
)
def test_other_layouts_pack_too(name, tmp_path):
    from helpers.families import FAMILIES
    from helpers.family_models import build_model, inputs

    family = FAMILIES[name]
    build_model(family).save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    outputs = []
    for folder in ("model", "packed"):
        model = load_moe(tmp_path / folder, expert_memory="100%")
        with torch.no_grad():
            outputs.append(model(**inputs(family)).logits)
        model.moeflow.close()
    assert torch.equal(*outputs)


def test_header_is_what_the_specification_says(packed_folder):
    data = (packed_folder / PACKED_FILE).read_bytes()
    assert data[:8] == b"MOEFLOW\x02"
    header = json.loads(data[24 : 24 + int.from_bytes(data[8:16], "little")])
    assert (header["format"], header["version"], len(header["layers"])) == ("moeflow-experts", 2, 3)
    import zlib

    for layer in header["layers"]:
        (record,), begin = layer["records"], int(layer["offset"], 16)
        assert begin % 4096 == 0
        for expected in layer["crc32"]:
            assert f"{zlib.crc32(data[begin : begin + record['record_bytes']]):08x}" == expected
            begin += -(-record["record_bytes"] // 4096) * 4096
    assert begin == len(data)


@pytest.fixture
def damaged(packed_folder, tmp_path):
    return shutil.copytree(packed_folder, tmp_path / "model")


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (0, b"X", "not a packed expert file"),
        (7, b"\x07", "version 7"),
        (9, b"\xff", "corrupt header"),
        (30, b"\x00", "corrupt header"),
    ],
)
def test_damaged_header_is_refused(damaged, place, value, match):
    with open(damaged / PACKED_FILE, "r+b") as file:
        file.seek(place)
        file.write(value)
    with pytest.raises(CheckpointError, match=match):
        load_moe(damaged)


def test_truncated_packed_file_is_refused(damaged):
    file = damaged / PACKED_FILE
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match="truncated"):
        load_moe(damaged)


def test_damaged_record_is_named_when_it_is_read(damaged):
    file = damaged / PACKED_FILE
    with open(file, "r+b") as handle:
        handle.seek(file.stat().st_size - 73728 * 8 + 100)  # somewhere in the last layer
        handle.write(b"\x55\xaa\x55")
    model = load_moe(damaged)
    with (
        pytest.raises(ExpertReadError, match=r"expert 0 of model\.layers\.2\.mlp\.experts is corrupt"),
        torch.no_grad(),
    ):
        model(torch.arange(1, 100).unsqueeze(0))
    model.moeflow.close()


def test_packed_file_of_another_model_or_dtype_is_refused(damaged):
    with pytest.raises(CheckpointError, match="dtype it was packed in"):
        load_moe(damaged, dtype=torch.bfloat16)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))
    with pytest.raises(CheckpointError, match="does not hold the experts of the model"):
        load_moe(damaged)


def test_existing_output_is_left_alone(mixtral_folder, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        pack_model(mixtral_folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="packed already"):
        pack_model(pack_model(mixtral_folder, tmp_path / "one").folder, tmp_path / "two")


_PACK = """
import os, signal, sys
from moeflow.convert.pack import pack_model
def progress(done, total):
    if done >= float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)
pack_model(sys.argv[1], sys.argv[2], progress=progress)
"""


@pytest.mark.slow
def test_killed_pack_is_continued_to_the_same_bytes(mixtral_folder, packed_folder, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    written = []
    for share in (0.3, 0.6, 0.9):
        run = subprocess.run(
            [sys.executable, "-c", _PACK, str(mixtral_folder), str(out), str(share)], capture_output=True
        )
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not out.exists()
        written.append(len((partial / "experts.journal").read_text().split("\n")))
    assert written[0] < written[1] < written[2]
    pack_model(mixtral_folder, out)
    assert not partial.exists()
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in packed_folder.iterdir())
    for file in packed_folder.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_partial_folder_of_another_model_is_not_continued(mixtral_folder, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "experts.journal").write_text("another model\n00000000\n")
    out = pack_model(mixtral_folder, tmp_path / "out").folder
    load_moe(out).moeflow.close()


_PACK_LIMITED = """
import resource, signal, sys
from moeflow.errors import MoeflowError
from moeflow.convert.pack import pack_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    pack_model(sys.argv[1], sys.argv[2])
except MoeflowError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.slow
def test_write_that_fails_leaves_nothing_under_the_final_name(mixtral_folder, tmp_path):
    """A file size limit makes the kernel refuse the write, as a full disk does."""
    out = tmp_path / "out"
    run = subprocess.run(
        [sys.executable, "-c", _PACK_LIMITED, str(mixtral_folder), str(out), "300000"], capture_output=True, text=True
    )
    assert run.returncode == 3, run.stderr
    assert "could not be written" in run.stdout
    assert not out.exists()
    pack_model(mixtral_folder, out)


def test_too_small_a_disk_is_noticed_before_anything_is_written(mixtral_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ConfigError, match="5 are free"):
        pack_model(mixtral_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def rewrite_header(folder, change):
    """Change a packed file's header and give it a checksum that agrees, as one who means harm would."""
    file = folder / PACKED_FILE
    data = file.read_bytes()
    length = int.from_bytes(data[8:16], "little")
    records = data[-(-(24 + length) // 4096) * 4096 :]
    header = json.loads(data[24 : 24 + length])
    text = change(header) or json.dumps(header).encode()
    prefix = data[:8] + struct.pack("<QII", len(text), zlib.crc32(text), 0)
    begin = prefix + text
    file.write_bytes(begin.ljust(-(-len(begin) // 4096) * 4096, b"\0") + records)


ODD_NUMBERS = [None, -1, 1.5, True, "4", [], 10**12, 10**30]


@pytest.mark.parametrize(
    "change",
    [
        lambda header: b"[" * 100_000,
        lambda header: b"[]",
        lambda header: b"\xff",
        lambda header: header.update(layers={}),
        lambda header: header["layers"][0].update(name=5),
        lambda header: header["layers"][0].update(name="x" * 100_000),
        lambda header: header["layers"][1].update(offset=header["layers"][0]["offset"]),
        *[lambda header, odd=odd: header["layers"][0].update(num_experts=odd) for odd in ODD_NUMBERS],
        *[lambda header, odd=odd: header["layers"][0]["records"][0].update(record_bytes=odd) for odd in ODD_NUMBERS],
        *[
            lambda header, odd=odd: header["layers"][0]["records"][0]["tensors"][1].update(offset=odd)
            for odd in [*ODD_NUMBERS, 0]
        ],
        *[
            lambda header, odd=odd: header["layers"][0]["records"][0]["tensors"][0].update(shape=odd)
            for odd in (None, "ab", [-1], [1.5], [True], [10**30])
        ],
        *[
            lambda header, odd=odd: header["layers"][0]["records"][0]["tensors"][0].update(dtype=odd)
            for odd in (None, 1, ["F32"], "Q")
        ],
        *[
            lambda header, odd=odd: header["layers"][0].update(offset=odd)
            for odd in (None, 4096, "x", "-00000000000fff0", "0x00000000001000", "f" * 16, "0" * 16, "f" * 5000)
        ],
        *[
            lambda header, odd=odd: header["layers"][0].update(crc32=odd)
            for odd in (None, [], ["z" * 8] * 8, ["-0000001"] * 8, [1] * 8)
        ],
        *[
            lambda header, odd=odd: header["layers"][0].update(record_of=odd)
            for odd in (None, [], [1] * 8, [-1] * 8, "0" * 8)
        ],
    ],
)
def test_hostile_header_with_a_right_checksum_is_refused_in_a_short_line(damaged, change):
    rewrite_header(damaged, change)
    opened = ModelFolder(damaged)
    with pytest.raises(CheckpointError, match=r"experts\.moeflow") as caught:
        opened.layers(opened.empty_model())
    assert len(str(caught.value)) < 700


def test_header_that_was_written_anew_unchanged_is_read(damaged):
    rewrite_header(damaged, lambda header: None)
    opened = ModelFolder(damaged)
    assert len(opened.layers(opened.empty_model())) == 3


def test_shard_that_changes_while_it_is_packed_is_named_and_nothing_is_written(mixtral_folder, tmp_path):
    folder = shutil.copytree(mixtral_folder, tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    with pytest.raises(MoeflowError, match=rf"{shard.name} changed on disk"):
        pack_model(folder, tmp_path / "out", progress=lambda done, of: os.utime(shard))
    assert not (tmp_path / "out").exists()
