"""Digests of logits at every residency: a budget may change the time, and no bit."""

import hashlib
from typing import Any

from gpu.models import draw_prompt, loaded
from gpu.worker import Tell


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Load one format at each residency, demand only and with a predictor.

    Raises:
        AssertionError: digests differ.
    """
    length, steps = (24, 4) if job["dry"] else (128, 24)
    found: dict[str, list[str]] = {}
    for share in job["shares"]:
        for predictor in (None,) if share == "100%" or job["dry"] else (None, "auto"):
            with loaded(job, job["format"], expert_memory=share, predictor=predictor) as model:
                for turn in ("cold", "warm"):
                    name = digest(model, length, steps)
                    tell({"share": share, "predictor": predictor or "none", "turn": turn, "digest": name})
                    found.setdefault(name, []).append(f"{share}, {predictor or 'none'}, {turn}")
                model.moeflow.check_integrity()
                del model  # the next finds its memory free
    require_equal(found)
    return {"equal": True, "runs": sum(map(len, found.values()))}


def require_equal(found: dict[str, list[str]]) -> None:
    """Raise an AssertionError unless all runs, listed by digest, have one digest."""
    assert len(found) == 1, f"{len(found)} different outputs: {found}"


def digest(model: Any, length: int, steps: int) -> str:
    """Return a digest of the logits of a prompt and of decode steps over tokens that are given."""
    import torch

    tokens, found = draw_prompt(model, length + steps), hashlib.sha256()
    with torch.no_grad():
        result = model(input_ids=tokens[:, :length], use_cache=True)
        _add(found, result.logits)
        for place in range(length, length + steps):
            token = tokens[:, place : place + 1]
            result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True)
            _add(found, result.logits)
    return found.hexdigest()[:16]


def _add(found: Any, logits: Any) -> None:
    import torch

    found.update(logits.cpu().contiguous().view(torch.uint8).numpy().tobytes())
