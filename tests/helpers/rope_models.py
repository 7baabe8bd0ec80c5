"""Tiny models of every rope type of transformers, prompts on both sides of their original context, and a table.

The table: `PYTHONPATH=.:tests python -m helpers.rope_models`.
"""

import copy
from dataclasses import replace
from typing import Any

from helpers.engine_requests import GREEDY, generated, tokens
from helpers.families import FAMILIES
from helpers.family_models import build_model
from moeflow.engine.engine import Engine

ORIGINAL = 24  # positions of the original context
_THETA: dict[str, Any] = {"rope_theta": 100.0}
_LONGER: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, **_THETA}
_YARN = {"rope_type": "yarn", **_LONGER, **_THETA}


def _longrope(pairs: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0 + pair / 8 for pair in range(pairs)], "long_factor": [4.0] * pairs}
    return {"rope_type": "longrope", **_LONGER, **factors, **_THETA}


ROPES: dict[str, tuple[str, dict[str, Any]]] = {  # family and rope_parameters
    "default": ("mixtral", {"rope_type": "default", **_THETA}),
    "linear": ("mixtral", {"rope_type": "linear", "factor": 4.0, **_THETA}),
    "proportional": ("mixtral", {"rope_type": "proportional", "factor": 4.0, **_THETA}),
    "yarn": ("mixtral", _YARN),
    "llama3": (
        "mixtral",
        {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LONGER, **_THETA},
    ),
    "dynamic": ("mixtral", _DYNAMIC),
    "longrope": ("mixtral", _longrope(4)),
    "longrope, cache dropped": ("phimoe", {**_longrope(4), "short_mscale": 1.0, "long_mscale": 1.6}),
    "dynamic, complex": ("deepseek_v2", _DYNAMIC),
    "longrope, grid": ("qwen3_vl_moe", {**_longrope(4), "mrope_section": [2, 1, 1]}),
    "by type of layer": ("mellum", {"sliding_attention": _longrope(4), "full_attention": _DYNAMIC}),
    "yarn, scaled queries": ("mistral4", {**_YARN, "llama_4_scaling_beta": 0.5}),
}
PREFIX = tokens(18, 11)


def _prompt(length: int) -> list[int]:
    return PREFIX[:length] + tokens(max(0, length - len(PREFIX)), length)


PROMPTS = {
    "short": [_prompt(5), _prompt(16)],
    "long": [_prompt(ORIGINAL + 1), _prompt(40), _prompt(40), _prompt(60)],
    "crossing": [_prompt(20), _prompt(ORIGINAL - 1), _prompt(ORIGINAL), _prompt(20)],
}


def rope_model(rope):
    """Build a model of this rope type."""
    family, parameters = ROPES[rope]
    dynamic = "dynamic" in str(parameters)  # it scales beyond max_position_embeddings, the others within
    changes = {
        "rope_parameters": parameters,
        "max_position_embeddings": ORIGINAL if dynamic else 4 * ORIGINAL,
        "sliding_window": 16 if family == "mellum" else None,
    }
    overrides = dict(FAMILIES[family].overrides)
    if family == "qwen3_vl_moe":
        overrides["text_config"] = {**overrides.get("text_config", {}), **changes}
    else:
        overrides.update(changes)
    return build_model(replace(FAMILIES[family], overrides=overrides))


def truth(model, prompt):
    """Return what generate() answers with a model that was never called: dynamic NTK remembers earlier calls."""
    return generated(copy.deepcopy(model), prompt)


def wrong_answers(model, **options):
    """Compare an engine with generate(): {kind of prompt: [wrong alone, wrong together, prompts]}."""
    fresh = copy.deepcopy(model)
    flat = [prompt for prompts in PROMPTS.values() for prompt in prompts]
    with Engine(model, **options) as engine:
        together = dict(zip(map(tuple, flat), engine.generate(flat, GREEDY), strict=True))
        found = {}
        for kind, prompts in PROMPTS.items():
            wanted = [truth(fresh, prompt) for prompt in prompts]
            alone = [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
            beside = [together[tuple(prompt)].token_ids for prompt in prompts]
            pairs = [sum(one != want for one, want in zip(answers, wanted, strict=True)) for answers in (alone, beside)]
            found[kind] = [*pairs, len(prompts)]
    return found


if __name__ == "__main__":
    print(f"wrong answers of the engine, of those of generate(); original context {ORIGINAL}")
    print(f"{'rope type':26}" + "".join(f"{kind + ' alone':>18}{kind + ' together':>20}" for kind in PROMPTS))
    for rope in ROPES:
        row = wrong_answers(rope_model(rope), max_step_tokens=32).values()
        print(f"{rope:26}" + "".join(f"{alone:>13} of {of}{beside:>15} of {of}" for alone, beside, of in row))
