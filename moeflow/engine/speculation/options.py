"""What may be asked of speculation: the sources of drafts, and how many tokens a draft has."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moeflow.errors import ConfigError

SOURCES = ("prompt_lookup", "token_recycling", "mtp")
"""Sources that need nothing but a name; "mtp" is of models that `load_moe` was told it for."""

SpeculationOption = str | Mapping[str, Any] | None


@dataclass(frozen=True)
class SpeculationOptions:
    """How an engine speculates.

    Args:
        sources: names of `SOURCES`.
        most: drafted tokens of a step, 1 to 31.
        gated: whether the gate chooses how many are verified; else all of them always are.
        packed: whether drafts are verified where steps are not native as well: logits then have other last bits.
        draft_model: a causal LM of transformers; None for none.
        draft_tokenizer: its tokenizer: with other tokens than the model's, its drafts go through text; None where they
            are known to be the same.

    Raises:
        ConfigError: an option is not allowed.
    """

    sources: tuple[str, ...] = ("prompt_lookup",)
    most: int = 7
    gated: bool = True
    packed: bool = False
    draft_model: Any = None
    draft_tokenizer: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.sources, str) or not set(self.sources) <= set(SOURCES):
            raise ConfigError(
                f"speculation sources={self.sources!r} is not allowed: give some of {', '.join(SOURCES)}."
            )
        if type(self.most) is not int or not 1 <= self.most <= 31:
            raise ConfigError(f"speculation most={self.most!r} is not allowed: give a whole number from 1 to 31.")
        if not self.sources and self.draft_model is None:
            raise ConfigError("speculation has no sources. Give some, a draft_model, or speculation=None.")
        if self.draft_tokenizer is not None and self.draft_model is None:
            raise ConfigError("speculation has a draft_tokenizer and no draft_model. Give both, or neither.")


def speculation_options(option: SpeculationOption) -> SpeculationOptions | None:
    """Return what `speculation=` asks for; None where there is to be none.

    Raises:
        ConfigError: it is not allowed.
    """
    if option is None or option == "off":
        return None
    if option == "auto":
        return SpeculationOptions()
    known = [one.name for one in fields(SpeculationOptions)]
    if not isinstance(option, Mapping):
        raise ConfigError(
            f'speculation={option!r} is not allowed: give "auto", "off", None or a dict of {", ".join(known)}.'
        )
    unknown = [name for name in option if name not in known]
    if unknown:
        raise ConfigError(f"speculation has no {unknown[0]!r}: give some of {', '.join(known)}.")
    return SpeculationOptions(**option)
