"""Native steps of families with unlike steps, against the model's own code; and which families keep their own."""

import pytest
import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow import load_moe
from moeflow.kernels.cpu.library import instruction_set

NATIVE = (
    "afmoe", "aria", "beam", "cohere2_moe", "dots1", "ernie4_5_moe", "gemma4", "gpt_oss", "granitemoe_swa",
    "minimax_m2", "minimax_m3_vl", "phimoe",
    "qwen3_moe",
)  # fmt: skip
OWN = {
    "deepseek_v3": "other keys and values than it keeps",
    "jamba": "other state than keys and values",
}
NUM_TOKENS = 14

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built"),
]


def logits_of(model):
    """Logits of greedy steps, and their tokens."""
    out = model.generate(
        torch.tensor([[5, 7, 11, 3, 9]]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits), out.sequences


@pytest.mark.parametrize("name", [*NATIVE, *OWN])
def test_steps_are_those_of_the_model(name, tmp_path):
    torch.set_num_threads(1)
    build_model(FAMILIES[name]).save_pretrained(tmp_path)
    found, about = {}, {}
    for step in ("python", "auto"):
        model = load_moe(tmp_path, device="cpu", expert_memory="100%", predictor=None, step=step)
        with model.moeflow:
            found[step], about = logits_of(model), model.moeflow.stats()["step"]
    (expected, tokens), (logits, own_tokens) = found["python"], found["auto"]
    assert torch.equal(tokens, own_tokens)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    if name in NATIVE:
        assert about == {"mode": "native", "reason": None, "steps": NUM_TOKENS - 1}
    else:
        assert about["mode"] == "python"
        assert OWN[name] in about["reason"]
