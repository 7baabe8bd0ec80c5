"""One model twice, as transformers loads it and with native steps, and what both answer to a call."""

from typing import Any, NamedTuple

import torch

PROMPT = torch.tensor([[5, 17, 33, 3, 42, 8, 50]])
LENGTH = PROMPT.shape[1] + 2  # positions after a token was generated and another is being asked for


class Pair(NamedTuple):
    """The same weights behind two implementations.

    Args:
        eager: as transformers loads them.
        native: with native steps, of which some have run.
    """

    eager: Any
    native: Any


def generate(model: Any, ids: torch.Tensor | None = PROMPT, **options: Any) -> list[torch.Tensor]:
    """Generate greedily; return the tokens and the logits that they were chosen by."""
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    return [out.sequences, torch.stack(out.logits)]


def cache_after(model: Any, num_tokens: int = 2) -> Any:
    """Return the cache of an answer of so many tokens."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    return model.generate(PROMPT, max_new_tokens=num_tokens, **options).past_key_values


def go_on(model: Any, cache: Any, token: int = 4, steps: int = 3, **arguments: Any) -> list[torch.Tensor]:
    """Go on by hand behind a cache, greedily; return the logits of each step."""
    made = []
    for _ in range(steps):
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True, **arguments)
        made.append(out.logits)
        token = int(out.logits[0, -1].argmax())
    return made


def compare(pair: Pair, ask: Any) -> int:
    """Ask both models the same, and assert one answer, or errors of one kind.

    Args:
        pair: the models.
        ask: called with each; returns tensors.

    Returns:
        How many native steps ran.
    """
    expected, before = _outcome(pair.eager, ask), pair.native.moeflow.step.num_steps
    found = _outcome(pair.native, ask)
    if isinstance(expected, Exception) or isinstance(found, Exception):
        assert type(found) is type(expected), (expected, found)
    else:
        for mine, its in zip(found, expected, strict=True):
            assert mine.shape == its.shape
            if its.numel():
                assert (mine.float() - its.float()).abs().max() <= 1e-5 * its.float().abs().max()
    return pair.native.moeflow.step.num_steps - before


def _outcome(model: Any, ask: Any) -> list[torch.Tensor] | Exception:
    try:
        with torch.no_grad():
            return ask(model)
    except Exception as error:
        return error
