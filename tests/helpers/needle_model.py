"""A hand-made model of one attention layer that answers a question with what a needle said, if it sees the needle.

A token's embedding is a direction of its own. Keys and queries lie in a channel that rotary embeddings hardly turn. The
key of a needle is 1 there, every other is 0. The query of `QUESTION` gives a needle a score of 24 and all else 0; that
of a filler gives it 4, so that it gets exp(4) times the attention of a filler. Needle n's value points to answer n.
Experts add nothing.
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

NEEDLES, QUESTION, FIRST_FILLER = (1, 2, 3), 4, 16  # tokens; fillers are those from the last one on
NO_ANSWER = 8  # what is said where no needle is seen: token 8
_WIDTH, _CHANNEL = 64, 7


def answer_of(needle: int) -> int:
    """Return the token that is said where a needle was seen."""
    return NO_ANSWER + needle


@torch.no_grad()
def needle_model() -> MixtralForCausalLM:
    """Build the model, of 2 heads of queries and keys each and 32 tokens."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=_WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e32}, tie_word_embeddings=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    for tensor in model.parameters():
        if tensor.ndim > 1:
            tensor.zero_()
    norm = _WIDTH**0.5  # of a direction, behind the norm of its length
    embed, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
    embed[:, :32] = torch.eye(32)
    for head in range(2):
        row = head * 16 + _CHANNEL
        for needle in NEEDLES:
            attention.k_proj.weight[row, needle] = 1 / norm
            attention.v_proj.weight[head * 16 + needle, needle] = 1 / norm
            attention.o_proj.weight[32 + needle, head * 16 + needle] = 10
        attention.q_proj.weight[row, FIRST_FILLER:32] = 4 * 16**0.5 / norm
        attention.q_proj.weight[row, QUESTION] = 24 * 16**0.5 / norm
    for needle in NEEDLES:
        model.lm_head.weight[answer_of(needle), 32 + needle] = 1
    model.lm_head.weight[NO_ANSWER, QUESTION] = 0.1
    return model


def haystack(num_tokens: int, needles: dict[int, int]) -> list[int]:
    """Return fillers that end with the question, with needles at some positions."""
    fillers = torch.randint(FIRST_FILLER, 32, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for position, needle in needles.items():
        fillers[position] = needle
    return [*fillers[:-1], QUESTION]
