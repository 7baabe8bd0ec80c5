"""Lossless experts, encoded at every read or packed once: the bits of bfloat16, and clear refusals of all else."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.lossless_models import NOT_WORTH_IT, foreign, lossless_mixtral, spoilt
from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.checkpoint.lossless_source import check_same
from moeflow.checkpoint.packed_file import PACKED_FILE, PREFIX_BYTES, packed_dtype
from moeflow.cli.main import main
from moeflow.convert.pack import pack_model
from moeflow.convert.quantize import quantize_model
from moeflow.errors import CheckpointError, ConfigError, ExpertReadError
from moeflow.kernels.cpu.library import library
from moeflow.kernels.quantization.formats import is_lossless
from moeflow.kernels.quantization.lossless import encode_lossless
from moeflow.paths import cache_folder

PROMPT = torch.tensor([[5, 17, 33, 3, 42, 8, 50]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16") / "model"
    lossless_mixtral().save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    return pack_model(folder, tmp_path_factory.mktemp("packed") / "out", lossless=True).folder


def answer(source, budget="100%", **options):
    """Return greedy tokens, their logits, and those of a prompt of 7 tokens."""
    loaded = load_moe(source, device="cpu", expert_memory=budget, **options)
    with loaded.moeflow as runtime, torch.no_grad():
        out = loaded.generate(
            PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        whole = loaded(PROMPT).logits
        mode = runtime.stats()["step"]["mode"] if options.get("step") != "python" else None
        return out.sequences, torch.stack(out.logits), whole, mode


@pytest.fixture(scope="module")
def expected(folder):
    return {step: answer(folder, step=step) for step in ("auto", "python")}


@pytest.mark.parametrize("step", ["auto", "python"])
@pytest.mark.parametrize("budget", ["25%", "100%"])
@pytest.mark.parametrize("way", ["on the fly", "packed"])
def test_logits_are_those_of_bfloat16_bit_for_bit(folder, packed, expected, way, budget, step):
    options = {"quantization": "lossless"} if way == "on the fly" else {}
    found = answer(folder if options else packed, budget, step=step, **options)
    for one, other in zip(found[:3], expected[step][:3], strict=True):
        assert torch.equal(one, other)
    assert found[3] == expected[step][3]
    if step == "auto" and library() is not None:
        assert found[3] == "native"


@pytest.mark.slow
def test_torch_computes_the_same_without_the_compiled_kernels(folder, packed):
    """In a process of its own, because the library is chosen once."""
    program = """
import sys, torch
from moeflow import load_moe
torch.set_num_threads(1)
found = []
for source, options in ((sys.argv[1], {}), (sys.argv[2], {}), (sys.argv[1], {"quantization": "lossless"})):
    model = load_moe(source, device="cpu", **options)
    with model.moeflow, torch.no_grad():
        found.append(model(torch.arange(1, 12).unsqueeze(0)).logits)
assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
"""
    environment = {**os.environ, "MOEFLOW_CPU_KERNELS": "off"}
    command = [sys.executable, "-c", program, str(folder), str(packed)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_experts_that_save_too_little_stay_bfloat16_and_it_is_said(folder, caplog):
    with caplog.at_level(logging.WARNING), load_moe(folder, device="cpu", quantization="lossless").moeflow as runtime:
        layouts = [source.layout for source in runtime.store.layers]
    kept = [(n, e) for n, layout in enumerate(layouts) for e in range(8) if not is_lossless(layout.record_of(e))]
    assert kept == [NOT_WORTH_IT]
    assert "1 experts stay bfloat16" in caplog.text
    formats = [matrix.format for matrix in layouts[0].record.matrices]
    rooms = [int(name.rpartition("-")[2]) for name in formats]
    assert all(room % 16 == 0 for room in rooms)
    assert rooms[0] > 0


def test_a_scan_is_kept_and_a_damaged_one_is_done_again(folder, caplog):
    with load_moe(folder, device="cpu", quantization="lossless").moeflow:
        pass
    files = set((cache_folder() / "lossless").glob("*.json"))
    changed = max(file.read_bytes().replace(b"[[[", b"[[[1") for file in files)  # another count
    for content in (None, changed, b"{}", b'{"crc32": "00000000", "escapes": [[[5]]]}', b"\xff"):
        if content is not None:
            for file in files:
                file.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.INFO), load_moe(folder, device="cpu", quantization="lossless").moeflow:
            assert ("looking at the exponents" in caplog.text) == (content is not None)
    assert set((cache_folder() / "lossless").glob("*.json")) == files


def test_a_packed_folder_is_smaller_and_takes_the_option_too(folder, packed, tmp_path):
    plain = pack_model(folder, tmp_path / "plain", lossless=False).folder
    small, large = ((path / PACKED_FILE).stat().st_size for path in (packed, plain))
    assert small < 0.85 * large
    with load_moe(packed, quantization="lossless").moeflow as runtime:
        assert is_lossless(runtime.store.layers[0].layout.record)
    with load_moe(plain, quantization="lossless").moeflow as runtime:
        assert is_lossless(runtime.store.layers[0].layout.record)


def test_a_stopped_run_is_continued_to_the_same_bytes(folder, packed, tmp_path):
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) > 12:  # of 24 experts: the scan is kept from `packed`
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_model(folder, tmp_path / "out", lossless=True, progress=stop)
    assert (tmp_path / "out.partial").is_dir()
    out = pack_model(folder, tmp_path / "out", lossless=True).folder
    assert (out / PACKED_FILE).read_bytes() == (packed / PACKED_FILE).read_bytes()


def test_the_command_packs(folder, packed, tmp_path, capsys):
    assert main(["pack", str(folder), str(tmp_path / "out"), "--lossless", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["folder"] == str(tmp_path / "out")
    assert (tmp_path / "out" / PACKED_FILE).read_bytes() == (packed / PACKED_FILE).read_bytes()


def test_a_record_that_would_not_come_back_is_refused():
    weight = torch.randn(4, 64, dtype=torch.bfloat16)
    codes, tops, escapes = encode_lossless(weight)
    check_same(weight, (codes, tops, escapes), "w")
    codes[1, 3] ^= 1
    with pytest.raises(CheckpointError, match=r"w would not come back"):
        check_same(weight, (codes, tops, escapes), "w")


def wrong_top(content, places):
    content[places["gate_up_proj_top"]] = 0


def strange_top(content, places):
    content[places["gate_up_proj_top"] + 1] = 255


def escape_far_away(content, places):
    content[places["gate_up_proj_escapes"] + 3] = 127


@pytest.mark.parametrize("damage", [wrong_top, strange_top, escape_far_away])
def test_a_foreign_record_is_refused_at_its_first_read_by_name(packed, tmp_path, damage):
    loaded = load_moe(foreign(packed, tmp_path / "out", damage), device="cpu", predictor=None)
    with loaded.moeflow, torch.no_grad():
        for _ in range(2):  # it is not taken for good the second time
            with pytest.raises(ExpertReadError, match=rf"expert 0 of model.layers.0.mlp.experts in .*{PACKED_FILE}"):
                loaded(torch.arange(128).unsqueeze(0))


def rot(file, at, content):
    """Change bytes of a file as a failing disk does, behind the back of its time of writing."""
    times = file.stat()
    with open(file, "r+b") as handle:
        handle.seek(at)
        handle.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_bytes_that_changed_after_the_scan_are_refused_by_name(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "model")
    plain = pack_model(folder, tmp_path / "plain", lossless=False).folder
    entry = open_checkpoint(source).tensors["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    header = json.loads((plain / PACKED_FILE).read_bytes()[PREFIX_BYTES:].split(b"\0")[0])
    places = ((source, open_checkpoint(source).files[entry.file], entry.begin, "has other exponents"),)
    places += ((plain, plain / PACKED_FILE, int(header["layers"][0]["offset"], 16), "is corrupt"),)
    for path, file, begin, message in places:
        with load_moe(path, device="cpu", quantization="lossless").moeflow:
            pass
        rot(file, begin, bytes(range(256)) * 8)
        loaded = load_moe(path, device="cpu", quantization="lossless", predictor=None)
        with loaded.moeflow, torch.no_grad(), pytest.raises(ExpertReadError, match=f"expert 0 of .*{message}"):
            loaded(torch.arange(128).unsqueeze(0))


def test_a_record_is_looked_into_once(packed):
    looked = []
    loaded = load_moe(packed, device="cpu", expert_memory="25%", predictor=None)
    with loaded.moeflow as runtime, torch.no_grad():
        for number, source in enumerate(runtime.store.layers):
            runtime.store.layers[number] = source._replace(
                check=lambda expert, record, number=number: looked.append((number, expert))
            )
        for _ in range(2):
            loaded(torch.arange(128).unsqueeze(0))
        assert runtime.store.stats()["reads"] > len(looked)
    assert sorted(looked) == [(layer, expert) for layer in range(3) for expert in range(8)]


def test_a_packed_folder_is_of_bfloat16(packed):
    assert packed_dtype(packed) == "BF16"


def test_float32_is_refused(mixtral_folder, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"F32, and lossless is for bfloat16"):
        load_moe(mixtral_folder, quantization="lossless")
    with pytest.raises(ConfigError, match=r"F32, and lossless is for bfloat16"):
        load_moe(folder, device="cpu", quantization="lossless", dtype="float32")
    with pytest.raises(ConfigError, match=r"F32, and lossless is for bfloat16"):
        pack_model(mixtral_folder, tmp_path / "out", lossless=True)
    assert list(tmp_path.iterdir()) == []


def test_matrices_of_in_by_out_are_refused(tmp_path):
    build_model(FAMILIES["gpt_oss"], dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"\[in, out\], and lossless is for matrices \[out, in\]"):
        load_moe(tmp_path, quantization="lossless")


def test_exponents_that_do_not_compress_are_refused(tmp_path):
    model = tiny_mixtral(intermediate_size=128, num_hidden_layers=1).bfloat16()
    for expert in range(8):
        spoilt(model, 0, expert, 0.4)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="exponents of these experts differ too much"):
        load_moe(tmp_path, quantization="lossless")


def test_quantised_experts_are_refused(folder, tmp_path):
    quantize_model(folder, tmp_path / "out", "int8", method="rtn")
    with pytest.raises(ConfigError, match="stored in int8 already, and lossless is for bfloat16"):
        load_moe(tmp_path / "out", quantization="lossless")


def test_a_name_that_is_near_is_told_of_it(folder):
    for name in ("losless", "bf16-lossless-16", "Lossless"):
        with pytest.raises(ConfigError, match='Or "lossless", for experts in bfloat16'):
            load_moe(folder, quantization=name)
