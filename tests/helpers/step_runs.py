"""Tiny families decoded by their step programs and by their own code, and the table of docs/families.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.paths import ROOT
from moeflow import load_moe

PAGE = ROOT / "docs" / "families.md"
NUM_TOKENS = 24
_PROMPT = [[5, 7, 11, 3, 9]]


class FamilyRun(NamedTuple):
    """How a family decoded.

    Args:
        mode: "native" or "python".
        reason: why it is not native.
        num_steps: native ones.
        instructions: of its programs, by kind.
        difference: the greatest between logits, of the greatest.
        same_tokens: whether greedy tokens are equal.
    """

    mode: str
    reason: str | None
    num_steps: int
    instructions: dict[str, int]
    difference: float
    same_tokens: bool


def run_family(name: str, folder: Path, dtype: torch.dtype = torch.float32, num_tokens: int = NUM_TOKENS) -> FamilyRun:
    """Decode greedily, both ways.

    Args:
        name: of the family.
        folder: for its checkpoint.
        dtype: of its weights.
        num_tokens: new ones.
    """
    build_model(FAMILIES[name], dtype=dtype).save_pretrained(folder)
    found, about, kinds = {}, {}, {}
    for step in ("python", "auto"):
        model = load_moe(folder, device="cpu", expert_memory="100%", predictor=None, step=step, dtype=dtype)
        with model.moeflow, torch.no_grad():
            if not model.can_generate():
                return FamilyRun("python", "it does not generate token by token", 0, {}, 0.0, True)
            torch.manual_seed(0)  # of families that begin with random tokens
            try:
                out = model.generate(
                    torch.tensor(_PROMPT), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None,
                    pad_token_id=0, output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
            except (AttributeError, ValueError) as error:
                if step == "auto":
                    raise
                return FamilyRun("python", f"`generate` of the tiny model fails: {error!s:.80}", 0, {}, 0.0, True)
            found[step], about = out, model.moeflow.stats()["step"]
            for runner in model.moeflow.step.programs if step == "auto" else ():
                for one in runner.bound.program.body:
                    kinds[one.kind] = kinds.get(one.kind, 0) + 1
    difference = 0.0
    if found["python"].get("logits") is not None:
        expected, logits = (torch.stack(found[step].logits).float() for step in ("python", "auto"))
        difference = float((logits - expected).abs().max() / expected.abs().max())
    same = torch.equal(found["python"].sequences, found["auto"].sequences)
    return FamilyRun(about["mode"], about["reason"], about["steps"], kinds, difference, same)


def documented() -> dict[str, tuple[str, str]]:
    """Return each family's cells "decodes" and "remarks" in docs/families.md."""
    rows = [line.strip("|\n ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name.strip("`"): (mode, remark) for name, mode, remark in rows}


def remark(run: FamilyRun) -> str:
    """Return the cell "remarks" of a run."""
    if run.mode == "python":
        return re.sub(r" by [\d.e+-]+ of its logits", "", run.reason or "").replace("|", "/")
    named = {"own": "attention by its own code", "attend_latent": "latent attention"}
    parts = [text for kind, text in named.items() if run.instructions.get(kind)]
    return ", ".join(parts + (["`torch` instructions"] if run.instructions.get("torch") else [])) or "-"
