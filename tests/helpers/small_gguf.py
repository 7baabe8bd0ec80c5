"""A small model in a GGUF file of three types, as a file of users has them, beside a chat template."""

from pathlib import Path

import torch
import transformers

from helpers.gguf_models import write_model

VOCAB = 320
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def small_model(**overrides: int) -> transformers.Qwen3MoeForCausalLM:
    """Return a model of two layers whose rows fit every type's blocks; `overrides` of its config."""
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 256, "num_hidden_layers": 2, "num_experts": 6, **overrides}
    config = transformers.Qwen3MoeConfig(
        hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts_per_tok=2, vocab_size=VOCAB, mlp_only_layers=[], norm_topk_prob=True, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, **sizes,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def type_of(name: str, shape: tuple[int, ...]) -> str:
    """Return the type of a tensor: Q4_K and Q6_K of experts, Q8_0 of other matrices."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "F32"
    if "_exps" in name:
        return "Q6_K" if "down" in name else "Q4_K"
    return "Q8_0"


def write_small(folder: Path) -> tuple[Path, transformers.PreTrainedModel]:
    """Write the model's file into a folder; return the file, and the model with the values that it stands for."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.gguf"
    model = write_model(file, "qwen3moe", small_model(), type_of)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return file, model
