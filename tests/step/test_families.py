"""Native steps of families with unlike steps, against the model's own code; and which families keep their own."""

import pytest
import torch

from helpers.families import FAMILIES
from helpers.step_runs import NUM_TOKENS, documented, remark, run_family
from moeflow.kernels.cpu.library import instruction_set

TRIED = (
    "afmoe", "beam", "gemma4", "gpt_oss", "granitemoe_swa", "minimax_m3_vl", "phimoe", "qwen2_moe", "qwen3_moe",
    "deepseek_v3", "kimi_linear", "mistral4",  # latent attention
    "jamba", "lfm2_moe", "qwen3_5_moe", "zaya",  # states beside keys and values
    "deepseek_v4", "glm_moe_dsa", "inkling", "unlimited_ocr",  # attention by their own code
    "ernie4_5_vl_moe", "glm4v_moe",  # positions in three dimensions
    "inkling2", "minimax", "openai_privacy_filter", "qwen4_exp",  # not native
)  # fmt: skip
"""A part of docs/families.md that has each kind of step; scripts/try_families.py tries all."""

IN_HALVES = ("qwen3_next", "deepseek_v2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(instruction_set() is None, reason="the compiled kernels were not built"),
]


def test_the_page_names_every_family_and_enough_are_native():
    page = documented()
    assert page.keys() == FAMILIES.keys()
    assert sum(mode == "native" for mode, _ in page.values()) >= 55
    assert all(cell not in ("", "-") for mode, cell in page.values() if mode == "python"), "a refusal without a reason"


@pytest.mark.parametrize("name", TRIED)
def test_a_family_decodes_as_the_page_says(name, tmp_path):
    torch.set_num_threads(1)
    run = run_family(name, tmp_path)
    assert run.same_tokens
    assert run.difference <= 1e-5
    assert (run.mode, remark(run)) == documented()[name]
    assert run.num_steps == (NUM_TOKENS - 1 if run.mode == "native" else 0)


@pytest.mark.parametrize("name", IN_HALVES)
def test_a_family_decodes_natively_in_halves(name, tmp_path):
    torch.set_num_threads(1)
    run = run_family(name, tmp_path, torch.bfloat16, num_tokens=8)
    assert run.mode == "native"
    assert run.num_steps == 7
    assert run.difference <= 5e-2
