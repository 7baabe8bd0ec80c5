"""Dense weights kept in the lossless format: the bits of bfloat16 in every pass, in less memory."""

import importlib

import pytest
import torch

from helpers.small_models import tiny_mixtral
from moeflow import load_moe
from moeflow.errors import ConfigError
from moeflow.hf.dense_kernels import FewTokensLinear, speed_up_dense
from moeflow.hf.passes.lossless_dense import LosslessEmbedding, LosslessLinear, compress_dense
from moeflow.kernels.cpu.ahead import FEW_TOKENS
from moeflow.kernels.cpu.library import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built")
PROMPT = torch.arange(3, 3 + 2 * FEW_TOKENS)[None]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lossless") / "model"
    tiny_mixtral(tie_word_embeddings=request.param, initializer_range=0.02).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def compressed(monkeypatch):
    """Let load_moe keep dense weights as codes."""

    def both(model):
        speed_up_dense(model)
        assert compress_dense(model) > 0

    monkeypatch.setattr(importlib.import_module("moeflow.loading.load_moe"), "speed_up_dense", both)


def _load(folder, step):
    return load_moe(folder, device="cpu", expert_memory="100%", predictor=None, step=step)


def _answer(model):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(PROMPT, output_logits=True, return_dict_in_generate=True, **options)
    with torch.no_grad():
        whole = model(PROMPT).logits
    return torch.cat((*out.logits, whole[0]))


@pytest.mark.parametrize("step", ["auto", "python"])
def test_logits_have_the_bits_of_bfloat16_weights(folder, step, request):
    plain = _load(folder, step)
    expected = _answer(plain)
    plain.moeflow.close()
    request.getfixturevalue("compressed")
    for _ in range(2):  # the second takes the step from the disk
        model = _load(folder, step)
        assert torch.equal(_answer(model), expected)
        assert type(model.lm_head) is type(model.model.layers[0].self_attn.q_proj) is LosslessLinear
        assert isinstance(model.model.embed_tokens, LosslessEmbedding) == model.config.tie_word_embeddings
        if step == "auto":
            assert model.moeflow.stats()["step"] == {"mode": "native", "reason": None, "steps": 11}
        model.moeflow.close()


def _linear(**options):
    torch.manual_seed(0)
    holder = torch.nn.Sequential(torch.nn.Linear(190, 45, **options)).bfloat16()
    with torch.no_grad():
        holder[0].weight[3, 7], holder[0].weight[44, 189] = 0.0, 1e-30  # escapes
    speed_up_dense(holder)
    return holder


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_gives_the_same_bits_in_less_memory(bias):
    plain, stored = _linear(bias=bias), _linear(bias=bias)
    before = stored[0].weight.nbytes
    saved = compress_dense(stored)
    after = sum(buffer.nbytes for buffer in stored.buffers())
    assert saved == before - after > 0.1 * before
    assert "0.weight" not in dict(stored.named_parameters())
    for num_tokens in (0, 1, 3, FEW_TOKENS, FEW_TOKENS + 1, 100):
        x = torch.randn(num_tokens, 190).bfloat16()
        with torch.no_grad():
            assert torch.equal(stored(x), plain(x))
    x = torch.randn(2, 190).bfloat16().requires_grad_()
    (flowing,) = torch.autograd.grad(stored(x).sum(), x)
    assert torch.equal(flowing, torch.autograd.grad(plain(x).sum(), x)[0])


def test_a_tied_embedding_gives_its_rows_whatever_their_order():
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(45, 190), "head": torch.nn.Linear(190, 45, bias=False)})
    model = model.bfloat16()
    model["head"].weight = model["table"].weight
    with torch.no_grad():
        model["head"].weight[3, 7], model["head"].weight[44, 189] = 0.0, 1e-30
    expected = model["table"].weight.detach().clone()
    speed_up_dense(model)
    assert compress_dense(model) > 0
    ids = torch.tensor([[44, 3, 3], [0, 17, 44]])
    assert torch.equal(model["table"](ids), expected[ids])
    assert model["table"](ids[:0]).shape == (0, 3, 190)
    assert model["table"].codes is model["head"].codes
    for wrong in (45, -1):
        with pytest.raises(IndexError):
            model["table"](torch.tensor([wrong]))


def test_a_state_dict_has_the_weights_and_loading_one_is_refused():
    plain, stored = _linear(), _linear()
    compress_dense(stored)
    found = stored.state_dict()
    assert found.keys() == plain.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in plain.state_dict().items())
    with pytest.raises(ConfigError, match="without quantization='lossless'"):
        stored.load_state_dict(found)


def test_a_weight_that_was_read_cannot_be_changed_and_other_keys_are_loaded():
    stored = _linear()
    compress_dense(stored)
    linear = stored[0]
    for change in (lambda: linear.weight.add_(1), lambda: linear.weight.data.mul_(2)):
        with torch.no_grad(), pytest.raises(ConfigError, match="kept in the lossless format"):
            change()
    bias = torch.ones_like(linear.bias)
    linear.load_state_dict({"bias": bias}, strict=False)
    assert torch.equal(linear.bias, bias)


def test_another_dtype_is_followed():
    plain, stored = _linear(), _linear()
    compress_dense(stored)
    x = torch.randn(3, 190)
    assert torch.equal(stored.float()(x), torch.nn.functional.linear(x, plain[0].weight.float(), plain[0].bias.float()))


def test_what_does_not_gain_or_is_used_otherwise_stays():
    def stays(holder):
        speed_up_dense(holder)
        assert compress_dense(holder) == 0
        assert type(holder[0]) is not LosslessLinear

    stays(torch.nn.Sequential(torch.nn.Linear(190, 45)))
    stays(torch.nn.Sequential(torch.nn.Linear(190, 45)).half())
    hooked = _linear()
    hooked[0].register_forward_hook(lambda *_: None)
    stays(hooked)
    shared = torch.nn.Sequential(*(torch.nn.Linear(45, 45, bias=False) for _ in range(2))).bfloat16()
    shared[1] = torch.nn.Bilinear(45, 45, 45, bias=False).bfloat16()
    shared[1].weight = shared[0].weight
    stays(shared)
    spread = torch.nn.Sequential(torch.nn.Linear(190, 45)).bfloat16()
    with torch.no_grad():
        spread[0].weight.mul_(torch.exp2(torch.randint(-60, 60, (45, 190)).float()).bfloat16())
    stays(spread)
    escaping = torch.nn.Sequential(torch.nn.Linear(640, 64)).bfloat16()
    with torch.no_grad():
        escaping[0].weight[:, 0] = 1e-30  # 64, where 40 are allowed
    stays(escaping)
    assert type(spread[0]) is FewTokensLinear
