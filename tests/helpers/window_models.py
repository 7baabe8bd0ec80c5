"""Small random models whose layers see a few positions only, and what they keep of a position."""

import torch
from transformers import GptOssConfig, GptOssForCausalLM, Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel

WINDOW = 8
LAYER_BYTES = 2 * 2 * 8 * 4  # of a position in one layer: keys and values, heads, features, float32


@torch.no_grad()
def _random(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        if tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model.eval()


def windowed_model(context: int = 1024, head_dim: int = 8) -> PreTrainedModel:
    """A model like gpt-oss: two layers of four see `WINDOW` positions, and each has sinks."""
    config = GptOssConfig(
        vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=4, head_dim=head_dim,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=context, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=WINDOW, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return _random(GptOssForCausalLM(config))


def chunked_model() -> PreTrainedModel:
    """A model like Llama 4: three layers of four see their chunk of 16 positions."""
    config = Llama4TextConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, num_local_experts=4,
        attention_chunk_size=16,
    )  # fmt: skip
    return _random(Llama4ForCausalLM(config))
