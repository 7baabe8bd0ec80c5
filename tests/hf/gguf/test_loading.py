"""GGUF files through load_moe: the values of their blocks, whatever the type, at every budget."""

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.gguf_models import write_model
from moeflow import load_moe
from moeflow.errors import UnsupportedModelError
from moeflow.hf.model_folder import ModelFolder

VOCAB = 320
PROMPT = torch.arange(5, 16)[None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFLOW_CACHE", str(tmp_path / "cache"))


def qwen3(**overrides):
    """Return a tiny Qwen3 model of sizes that every type's blocks fit."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_experts=6, num_experts_per_tok=2, vocab_size=VOCAB,
        mlp_only_layers=[], norm_topk_prob=True, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
        **overrides,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def blocks_of(kind, down=None, dense=None):
    """Return a rule of types: experts' matrices in one, their down projections in another, dense ones in a third."""

    def type_of(name, shape):
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return "F32"
        if "_exps" in name:
            return down if down and "down" in name else kind
        return dense or kind

    return type_of


def check(path, model, dtype="float32", **options):
    """Load the file and compare logits with transformers; return the loaded model's first logits."""
    loaded = load_moe(path, dtype=dtype, device="cpu", expert_memory="50%", **options)
    with loaded.moeflow, torch.no_grad():
        found = loaded(PROMPT).logits
        single = torch.cat([loaded(PROMPT[:, :1]).logits, loaded(PROMPT[:, 1:2]).logits])
    with torch.no_grad():
        expected = model(PROMPT).logits
        alone = torch.cat([model(PROMPT[:, :1]).logits, model(PROMPT[:, 1:2]).logits])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=float(1e-5 * expected.abs().max()))
    torch.testing.assert_close(single, alone, rtol=1e-3, atol=float(1e-5 * alone.abs().max()))
    return found


@pytest.mark.parametrize(
    "kind",
    ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
     "MXFP4", "IQ3_S"],
)  # fmt: skip
def test_every_type_gives_the_values_of_its_blocks(kind, tmp_path):
    model = write_model(tmp_path / "model.gguf", "qwen3moe", qwen3(), blocks_of(kind))
    check(tmp_path / "model.gguf", model)


def test_a_type_without_a_kernel_is_said_to_be_slow(tmp_path, caplog):
    for kind, said in (("IQ3_S", ["iq3_s"]), ("Q4_K", [])):
        write_model(tmp_path / f"{kind}.gguf", "qwen3moe", qwen3(), blocks_of(kind))
        caplog.clear()
        load_moe(tmp_path / f"{kind}.gguf", device="cpu").moeflow.close()
        told = [record.getMessage() for record in caplog.records if "which is slow" in record.getMessage()]
        assert [text.split()[5] for text in told] == said


def test_types_may_differ_between_matrices(tmp_path):
    model = write_model(tmp_path / "model.gguf", "qwen3moe", qwen3(), blocks_of("Q4_K", down="Q6_K", dense="Q8_0"))
    check(tmp_path / "model.gguf", model)


def test_gate_and_up_of_two_types_become_floats(tmp_path):
    def type_of(name, shape):
        return "Q5_K" if "ffn_up_exps" in name else blocks_of("Q4_K")(name, shape)

    model = write_model(tmp_path / "model.gguf", "qwen3moe", qwen3(), type_of)
    check(tmp_path / "model.gguf", model)


def test_tied_embeddings_are_held_once(tmp_path):
    model = write_model(tmp_path / "model.gguf", "qwen3moe", qwen3(tie_word_embeddings=True), blocks_of("Q6_K"))
    check(tmp_path / "model.gguf", model)
    with (loaded := load_moe(tmp_path / "model.gguf", device="cpu")).moeflow:
        assert loaded.lm_head.blocks.data_ptr() == loaded.model.embed_tokens.blocks.data_ptr()


def test_neither_loading_nor_a_token_copies_or_unpacks_a_matrix(tmp_path):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            blocks = [one for one in args if isinstance(one, torch.Tensor) and one.dtype == torch.uint8]
            if blocks and blocks[0].numel() > 1000:
                seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    seen: set[str] = set()
    write_model(tmp_path / "model.gguf", "qwen3moe", qwen3(), blocks_of("Q4_K"))
    with Watching():
        model = load_moe(tmp_path / "model.gguf", device="cpu")
    with model.moeflow:
        assert not seen & {"block_weight", "clone", "_to_copy"}
        with Watching():
            model.generate(PROMPT, max_new_tokens=3, do_sample=False)
    assert not seen & {"block_weight", "clone", "_to_copy"}


def test_bits_are_the_same_at_every_budget_and_in_native_steps(tmp_path):
    write_model(tmp_path / "model.gguf", "qwen3moe", qwen3(), blocks_of("Q4_K", down="Q6_K"))
    told = []
    for budget in ("100%", "40%"):
        loaded = load_moe(tmp_path / "model.gguf", dtype="bfloat16", device="cpu", expert_memory=budget)
        with loaded.moeflow:
            out = loaded.generate(
                PROMPT, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        told.append(torch.cat(out.logits))
    assert torch.equal(*told)


def test_floats_are_rounded_as_transformers_rounds_them(tmp_path):
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        hidden_size=256, intermediate_size=256, moe_intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=64,
        kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, first_k_dense_replace=1,
        vocab_size=VOCAB, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.normal_()
    write_model(tmp_path / "model.gguf", "deepseek2", model, blocks_of("F32"))
    model.save_pretrained(tmp_path / "own")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.bfloat16)
    loaded = load_moe(tmp_path / "model.gguf", dtype="bfloat16", device="cpu")
    with loaded.moeflow:
        found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        wanted = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
        assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name


def test_a_type_that_is_not_read_is_refused_by_its_tensor(tmp_path):
    write_model(tmp_path / "model.gguf", "qwen3moe", qwen3(), blocks_of("Q8_0"))
    for name in ("blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight"):
        folder = ModelFolder(tmp_path / "model.gguf")
        tensors = {**folder.gguf.tensors, name: folder.gguf.tensors[name]._replace(dtype="Q8_K")}
        folder.gguf = folder.gguf._replace(tensors=tensors)
        with pytest.raises(UnsupportedModelError, match=f"{name} is stored as Q8_K"):
            folder.layers(folder.empty_model())
        with pytest.raises(UnsupportedModelError, match=f"{name} is stored as Q8_K"):
            folder.dense_weights(torch.float32, keeps_blocks=True)
