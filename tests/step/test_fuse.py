"""Fused programs: fewer instructions, the same bits, and what another instruction reads is still made."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.hf import experts_interface
from moeflow.hf.passes.caches.growing_cache import GrowingCache
from moeflow.hf.passes.capture import capture
from moeflow.hf.passes.forward import cache_argument
from moeflow.hf.passes.step_rows import StepRows
from moeflow.kernels.cpu.library import instruction_set
from moeflow.step.bound import BoundProgram
from moeflow.step.fuse import fuse
from moeflow.step.lower import lower
from moeflow.step.program import Buffer, Instruction, Operand, Program
from moeflow.step.runner import StepRunner

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.tensor([[5, 17, 99, 3, 42, 8, 64]])


def tiny_qwen2():
    """Biases on q, k and v; a shared expert."""
    config = Qwen2MoeConfig(
        hidden_size=48, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2,
        vocab_size=128, decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(3)
    return Qwen2MoeForCausalLM(config)


@pytest.fixture(scope="module", params=["mixtral float32", "mixtral bfloat16", "qwen2 bfloat16"])
def model(request, tmp_path_factory):
    name, dtype = request.param.split()
    made = tiny_mixtral() if name == "mixtral" else tiny_qwen2()
    folder = tmp_path_factory.mktemp("fuse") / "model"
    made.to(getattr(torch, dtype)).save_pretrained(folder)
    loaded = load_moe(folder, expert_memory="100%", predictor=None, step="auto", device="cpu")
    with loaded.moeflow:
        loaded(PROMPT)  # the experts come
        yield loaded


@torch.no_grad()
def logits_of(model, program):
    """[steps, rows, V]: the logits of some tokens at their positions, by a program of one or of two rows."""
    experts = [module._moeflow for _, module in experts_interface.experts_modules(model)]
    runner = StepRunner(BoundProgram(program, model), model.moeflow, experts)
    cache, num_rows = GrowingCache.of_model(model), program.num_rows
    type(model).forward(model, input_ids=PROMPT.repeat(num_rows, 1), use_cache=True, **cache_argument(model, cache))
    made = []
    for token in (4, 77, 101):
        ids = torch.full((num_rows, 1), token)
        positions = torch.full((num_rows,), PROMPT.shape[1])
        made.append(runner.step(StepRows(cache, ids, positions, torch.zeros(num_rows, dtype=torch.int64))).clone())
    return torch.stack(made)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_fused_programs_have_the_bits_of_the_others_at_any_number_of_threads(model, num_rows):
    program = lower(capture(model, num_rows), num_rows)
    fused = fuse(program)
    kinds = Counter(one.kind for one in fused.body)
    layers = model.config.num_hidden_layers
    assert kinds["rope"] == 2 * layers  # of queries and of keys
    assert kinds["add_norm"] == 2 * layers
    assert kinds["linear"] < Counter(one.kind for one in program.body)["linear"] - layers
    expected = logits_of(model, program)
    assert torch.equal(logits_of(model, fused), expected)
    before = torch.get_num_threads()
    try:
        for num_threads in (2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(logits_of(model, fused), expected), num_threads
    finally:
        torch.set_num_threads(before)


def test_fusing_again_changes_nothing(model):
    fused = fuse(lower(capture(model, 1), 1))
    assert fuse(fused).text() == fused.text()


# ---- What must not be joined ----


def operand(number, *sizes, dtype=torch.float32, offset=0):
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return Operand(number, dtype, sizes, tuple(strides), offset)


def program_of(body, kinds):
    return Program(1, [Buffer(kind, "", 256) for kind in kinds], [], body, body[-1].outputs[0])


def plain(op, out, *inputs):
    return Instruction("pointwise", (out,), inputs, {"op": op})


def rotation():
    """x * cos + turned * sin: x 0, cos 1, sin 2; the parts from 3 on."""
    x, cos, sin, first, negated, turned, second, out = (operand(number, 1, 8) for number in range(8))
    negated = operand(4, 1, 4)
    lower_half, upper_half = replace(x, sizes=(1, 4)), replace(x, sizes=(1, 4), offset=4)
    left, right = replace(turned, sizes=(1, 4)), replace(turned, sizes=(1, 4), offset=4)
    return [
        plain("mul", first, x, cos), plain("neg", negated, upper_half), plain("copy", left, negated),
        plain("copy", right, lower_half), plain("mul", second, turned, sin), plain("add", out, first, second),
    ]  # fmt: skip


KINDS = ["input"] * 3 + ["made"] * 5


def test_a_rotation_becomes_one_instruction():
    assert [one.kind for one in fuse(program_of(rotation(), KINDS)).body] == ["rope"]


@pytest.mark.parametrize("kept", [3, 4, 5, 6])
def test_a_rotation_whose_parts_are_read_elsewhere_stays(kept):
    kinds = [*KINDS]
    kinds[kept] = "kept"
    assert len(fuse(program_of(rotation(), kinds)).body) == 6
    read = plain("neg", operand(8, 1, 4), operand(kept, 1, 4))
    assert len(fuse(program_of([*rotation(), read], [*KINDS, "made"])).body) == 7


def test_a_rotation_the_other_way_stays():
    body = rotation()
    body[1] = plain("neg", body[1].outputs[0], replace(body[1].inputs[0], offset=0))
    body[3] = plain("copy", body[3].outputs[0], replace(body[3].inputs[0], offset=4))
    assert len(fuse(program_of(body, KINDS)).body) == 6


def test_linears_of_two_inputs_or_of_a_weight_that_is_computed_stay():
    x, other, out = operand(0, 1, 8), operand(0, 1, 8, offset=8), operand(3, 1, 4)
    weights, computed = operand(1, 4, 8), operand(2, 4, 8)
    kinds = ["made", "weight", "made", "made", "made"]
    one, two = (
        [Instruction("linear", (out,), (x, weights)), Instruction("linear", (operand(4, 1, 4),), given)]
        for given in ((other, weights), (x, computed))
    )
    assert len(fuse(program_of(one, kinds)).body) == len(fuse(program_of(two, kinds)).body) == 2


def test_a_norm_of_a_sum_with_a_factor_stays():
    a, b, weight, total, out = (operand(number, 1, 8) for number in range(5))
    norm = Instruction("rms_norm", (out,), (total, weight), {"eps": 1e-6})
    kinds = ["input", "input", "weight", "made", "made"]
    assert len(fuse(program_of([plain("add", total, a, b), norm], kinds)).body) == 2 - 1
    add = Instruction("pointwise", (total,), (a, b), {"op": "add", "factor": 2.0})
    assert len(fuse(program_of([add, norm], kinds)).body) == 2


def test_the_tokens_of_fused_steps_are_transformers(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    loaded = load_moe(tmp_path, expert_memory="100%", predictor=None, step="auto", device="cpu")
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with loaded.moeflow:
        assert torch.equal(loaded.generate(PROMPT, **options), eager.generate(PROMPT, **options))
        assert " rope " in loaded.moeflow.step.text()
