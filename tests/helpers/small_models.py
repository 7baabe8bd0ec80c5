"""Small real models that tests build, save and load."""


def tiny_mixtral(**overrides):
    """Build a random Mixtral of 3 layers x 8 experts, of which a token takes 2."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    return MixtralForCausalLM(MixtralConfig(**{**values, **overrides})).eval()
