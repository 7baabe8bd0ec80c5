"""Programs as files: read as they were written, and never a file that is damaged or could do harm."""

import json
import random
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from helpers.damage import damaged
from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.paths import ROOT
from moeflow import load_moe
from moeflow.atomic_file import NO_CHECKSUM, seal
from moeflow.errors import UnsupportedModelError
from moeflow.hf.passes.capture import capture
from moeflow.kernels.cpu.library import instruction_set
from moeflow.step.lower import lower
from moeflow.step.program import KINDS, Instruction, Operand
from moeflow.step.program_file import KeptProgram, read_program, write_program
from moeflow.step.sound import _RULES

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
KEY = "a" * 64


@pytest.fixture(scope="module")
def model(mixtral_folder):
    with (model := load_moe(mixtral_folder, device="cpu", expert_memory="100%", predictor=None)).moeflow:
        yield model


@pytest.fixture(scope="module")
def program(model):
    return lower(capture(model, 1), 1)


def weights_of(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


@pytest.fixture
def written(tmp_path, program):
    path = tmp_path / "programs" / "one.json"
    write_program(path, KEY, KeptProgram(program, None))
    return path


@pytest.fixture
def read(written, model):
    return lambda key=KEY, layers=3: read_program(written, key, weights_of(model), layers)


def change(path, edit):
    """Edit a file's JSON, and give it the checksum that it then has."""
    about = json.loads(path.read_bytes())
    edit(about)
    path.write_bytes(seal(json.dumps({**about, "crc32": NO_CHECKSUM}).encode()))


def test_a_program_is_read_as_it_was_written(read, program):
    found = read()
    assert found.reason is None
    assert program.residuals
    for part in fields(program):
        assert getattr(found.program, part.name) == getattr(program, part.name), part.name
    assert found.program.text() == program.text()


def test_literals_and_arguments_of_torch_keep_their_values(tmp_path, program, model):
    operand = program.logits
    literal = torch.arange(6).reshape(2, 3).t()
    about = {
        "call": None,
        "args": [operand, [1, None, 0.5, True]],
        "kwargs": {"dtype": torch.float64, "layout": torch.strided},
    }
    one = program.body[-1]
    body = [*program.body[:-1], type(one)("torch", one.outputs, (operand,), about)]
    changed = replace(program, body=body, literals={"table": literal})
    changed.body[-1].attributes["op"] = "aten.add.Tensor"
    write_program(tmp_path / "one.json", KEY, KeptProgram(changed, None))
    kept = json.loads((tmp_path / "one.json").read_bytes())["program"]
    assert kept["body"][-1][3]["dict"]["kwargs"] == {
        "dict": {"dtype": {"dtype": "float64"}, "layout": {"layout": "strided"}}
    }
    assert read_program(tmp_path / "one.json", KEY, weights_of(model), 3) is None  # add takes no list


def test_a_reason_is_kept_in_place_of_a_program(tmp_path, model):
    write_program(tmp_path / "one.json", KEY, KeptProgram(None, "it looks at its data"))
    assert read_program(tmp_path / "one.json", KEY, weights_of(model), 3) == (None, "it looks at its data")


def test_a_damaged_file_is_no_program(written, read):
    whole = written.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        content = damaged(whole, rng, 200)
        written.write_bytes(content)
        assert content == whole or read() is None
    for content in (b"", b"\0" * 100, b"[" * 100_000, seal(b'{"crc32": "00000000"}'), whole[:-1]):
        written.write_bytes(content)
        assert read() is None


def test_a_folder_and_a_pipe_are_no_program(tmp_path, model):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "absent"):
        assert read_program(path, KEY, weights_of(model), 3) is None


def test_a_program_of_another_key_or_format_is_not_taken(written, read):
    assert read("b" * 64) is None
    change(written, lambda about: about.update(format=99))
    assert read() is None


def test_a_program_of_another_model_is_not_taken(written, read, model):
    smaller = {**weights_of(model), "lm_head.weight": torch.zeros(64, 64)}
    assert read_program(written, KEY, smaller, 3) is None
    other = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in weights_of(model).items()
    }
    assert read_program(written, KEY, other, 3) is None
    assert read(layers=2) is None


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default", "aten.add_.Tensor", "aten.resize_.default", "aten._efficientzerotensor.default",
        "moeflow.experts.default", "prims.add.default", "aten.nothing.default", "os.system.default", "aten.add",
    ],
)  # fmt: skip
def test_other_operations_than_torchs_pure_ones_are_not_called(written, read, name):
    place = [0, "float32", [1, 1, 128], [128, 128, 1], 0]

    def edit(about):
        about["program"]["body"] += [["torch", [place], [], {"dict": {"op": name, "args": [], "kwargs": {"dict": {}}}}]]

    change(written, edit)
    assert read() is None


def first_of(program, kind):
    return next(one for one in program["body"] if one[0] == kind)


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("linear", lambda one: one[1][0].__setitem__(2, [1, 1, 8])),  # fewer results than rows
        ("linear", lambda one: one[2][0].__setitem__(4, 1 << 30)),  # far outside of the buffer
        ("linear", lambda one: one[2][0].__setitem__(0, 10_000)),
        ("linear", lambda one: one[2][1].__setitem__(1, "bfloat16")),
        ("linear", lambda one: one.__setitem__(0, "nonlinear")),
        ("rms_norm", lambda one: one[2][0].__setitem__(3, [64, 64, -1])),
        ("experts", lambda one: one[3]["dict"].update(layer=3)),
        ("experts", lambda one: one[3]["dict"].update(layer=-1)),
        ("attend", lambda one: one[3]["dict"].update(layer=1)),  # twice the same
        ("attend", lambda one: one[2][1].__setitem__(2, [1, 3, 1, 16])),
        ("pointwise", lambda one: one[3]["dict"].update(op="explode")),
        ("pointwise", lambda one: one[2].append(one[2][0])),
        ("top_k", lambda one: one[1][1].__setitem__(1, "bool")),
        ("rows", lambda one: one[2][0].__setitem__(2, [1 << 20, 64])),
    ],
)
def test_an_instruction_that_would_leave_its_tensors_is_refused(written, read, kind, edit):
    change(written, lambda about: edit(first_of(about["program"], kind)))
    assert read() is None


def test_each_kind_that_lowering_writes_has_a_rule():
    assert set(KINDS) - set(_RULES) <= {"torch", "own", "add_norm", "rope"}  # the last two: written behind the file


def test_a_lossless_linear_whose_parts_do_not_fit_is_refused():
    def linear(**changes):
        sizes = {"x": (1, 100), "codes": (45, 192), "tops": (45,), "escapes": (80,), "out": (1, 45), **changes}
        dtypes = {"codes": torch.uint8, "tops": torch.uint16, "escapes": torch.uint8}
        made = {
            name: Operand(0, dtypes.get(name, torch.bfloat16), size, (1,) * len(size), 0)
            for name, size in sizes.items()
        }
        out = made.pop("out")
        return _RULES["linear"](Instruction("linear", (out,), tuple(made.values())))

    assert linear()
    assert linear(bias=(45,))
    wrong = {"x": (1, 200), "codes": (45, 96), "tops": (44,), "escapes": (81,), "out": (1, 46), "bias": (44,)}
    for name, size in wrong.items():
        assert not linear(**{name: size}), name


@pytest.mark.slow
def test_no_changed_number_of_a_file_ends_the_process(tmp_path, mixtral_folder, written):
    """What passes the look at it may compute nonsense or raise; it reads and writes no other memory."""
    program = f"""
import json, random, sys, torch
from moeflow import load_moe
from moeflow.atomic_file import NO_CHECKSUM, seal
from moeflow.errors import UnsupportedModelError
from moeflow.hf import experts_interface
from moeflow.hf.passes.forward import cache_argument
from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.hf.passes.step_rows import StepRows
from moeflow.step.bound import BoundProgram
from moeflow.step.fuse import fuse
from moeflow.step.program_file import read_program
from moeflow.step.runner import StepRunner

from pathlib import Path
path = Path({str(written)!r})
whole = open(path, "rb").read()
model = load_moe({str(mixtral_folder)!r}, device="cpu", expert_memory="100%", predictor=None)
weights = {{**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}}
experts = [module._moeflow for _, module in experts_interface.experts_modules(model)]
rng, ran, refused = random.Random(1), 0, 0

def places(value):
    if isinstance(value, (list, dict)):
        for name in range(len(value)) if isinstance(value, list) else value:
            if type(value[name]) is int:
                yield value, name
            else:
                yield from places(value[name])

with torch.no_grad():
    for _ in range(400):
        about = json.loads(whole)
        holder, name = rng.choice(list(places(about["program"])))
        old = holder[name]
        holder[name] = rng.choice([old + 1, old - 1, old * 2, 0, 1, rng.randrange(300), 1 << 20, 1 << 39])
        open(path, "wb").write(seal(json.dumps({{**about, "crc32": NO_CHECKSUM}}).encode()))
        kept = read_program(path, {KEY!r}, weights, len(experts))
        if kept is None:
            refused += 1
            continue
        try:
            runner = StepRunner(BoundProgram(fuse(kept.program), model), model.moeflow, experts)
            cache = GrowingCache.of_model(model)
            prompt = torch.tensor([[3, 7, 2]])
            type(model).forward(model, input_ids=prompt, use_cache=True, **cache_argument(model, cache))
            for position in (3, 200):
                runner.step(StepRows(cache, torch.tensor([[4]]), torch.tensor([position])))
            ran += 1
        except Exception:
            pass
print("ran", ran, "refused", refused)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ran, refused = map(int, done.stdout.split()[1::2])
    assert ran > 10
    assert refused > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "jamba", "qwen3_next", "minimax", "gpt_oss", "gemma4", "laguna"])
def test_programs_of_unlike_families_are_read_as_they_were_written(tmp_path, name):
    """Latent attention, states, calls of the model's own modules, literals."""
    build_model(FAMILIES[name]).save_pretrained(tmp_path / "model")
    with (model := load_moe(tmp_path / "model", device="cpu", expert_memory="100%", predictor=None)).moeflow:
        try:
            program = lower(capture(model, 1), 1)
        except UnsupportedModelError:
            pytest.skip("it has no program")
        write_program(tmp_path / "one.json", KEY, KeptProgram(program, None))
        found = read_program(tmp_path / "one.json", KEY, weights_of(model), len(model.moeflow.experts_per_layer))
    assert found is not None
    assert found.program.text() == program.text()
    assert found.program.body[-1] == program.body[-1]
