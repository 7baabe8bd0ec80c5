"""Options of the policies of keys and values for long contexts: which there are, their sizes, and what is refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from moeflow.errors import ConfigError

KeyValuePolicyOption = str | Mapping[str, Any] | None


@dataclass(frozen=True)
class SinksOptions:
    """The first positions and the last ones are attended; others are forgotten.

    Args:
        sinks: positions at the beginning of a sequence that every query sees.
        window: last positions that a query sees, its own among them.

    Raises:
        ConfigError: a size is not allowed.
    """

    sinks: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        _check_sizes("sinks", self)


@dataclass(frozen=True)
class HeavyHittersOptions:
    """Positions that get most attention stay, with the most recent ones; others are forgotten.

    Args:
        budget: positions that stay.
        recent: of these, the last ones, whatever attention they get.
        block: a sequence forgets at positions that are multiples of it, never between.

    Raises:
        ConfigError: a size is not allowed.
    """

    budget: int = 1024
    recent: int = 512
    block: int = 64

    def __post_init__(self) -> None:
        _check_sizes("heavy_hitters", self)
        if self.budget <= self.recent:
            raise ConfigError(
                f'kv_policy="heavy_hitters" has budget={self.budget}, of which recent={self.recent} are the last '
                f"positions, and none is left for others: give a budget of at least {self.recent + 1}, or a smaller "
                "recent."
            )


@dataclass(frozen=True)
class PagesOptions:
    """All positions are kept, in pages; a query attends to those that may matter most to it.

    Args:
        page: positions of a page.
        pages: most pages that a query attends to: the first, its own, the one before it, and those it chooses.

    Raises:
        ConfigError: a size is not allowed.
    """

    page: int = 16
    pages: int = 64

    def __post_init__(self) -> None:
        _check_sizes("pages", self)
        if self.pages < 4:
            raise ConfigError(
                f'kv_policy="pages" has pages={self.pages}: give at least 4, for the first page, the last two, and one '
                "that is chosen."
            )


KeyValuePolicyOptions = SinksOptions | HeavyHittersOptions | PagesOptions
KEY_VALUE_POLICIES: dict[str, type[KeyValuePolicyOptions]] = {
    "sinks": SinksOptions,
    "heavy_hitters": HeavyHittersOptions,
    "pages": PagesOptions,
}
"""By name."""


def kv_policy_options(option: KeyValuePolicyOption) -> KeyValuePolicyOptions | None:
    """Return what `kv_policy=` asks for; None where there is to be none.

    Args:
        option: None, a name, "NAME:SIZE=NUMBER,..." or a mapping with the name as "name".

    Raises:
        ConfigError: there is no such policy, or a size is not allowed.
    """
    if option is None:
        return None
    allowed = f"Allowed: None, {', '.join(KEY_VALUE_POLICIES)}, or a dict of a name and its sizes."
    if not isinstance(option, (str, Mapping)):
        raise ConfigError(f"kv_policy={option!r:.80} is no policy. {allowed}")
    sizes = _parsed(option) if isinstance(option, str) else dict(option)
    name = sizes.pop("name", None)
    if not isinstance(name, str) or name not in KEY_VALUE_POLICIES:
        raise ConfigError(f"kv_policy={name!r:.80} is unknown. {allowed}")
    known = [one.name for one in fields(KEY_VALUE_POLICIES[name])]
    for unknown in sizes.keys() - set(known):
        raise ConfigError(f'kv_policy="{name}" has no {unknown!r:.80}: give some of {", ".join(known)}.')
    return KEY_VALUE_POLICIES[name](**sizes)


def described(options: KeyValuePolicyOptions) -> dict[str, Any]:
    """Return a policy's name and sizes, as a mapping that asks for it."""
    name = next(name for name, made in KEY_VALUE_POLICIES.items() if isinstance(options, made))
    return {"name": name, **asdict(options)}


def _parsed(text: str) -> dict[str, Any]:
    """Read "NAME" or "NAME:SIZE=NUMBER,..."."""
    name, colon, rest = text.partition(":")
    sizes: dict[str, Any] = {"name": name}
    for part in rest.split(",") if colon else []:
        size, _, number = part.partition("=")
        if not number.strip().isdecimal():
            raise ConfigError(
                f"kv_policy={text!r:.80} has {part!r:.80} where a size belongs: write it as "
                f'"{name:.40}:SIZE=NUMBER,...".'
            )
        sizes[size.strip()] = int(number)
    return sizes


def _check_sizes(name: str, options: KeyValuePolicyOptions) -> None:
    for size, value in vars(options).items():
        if type(value) is not int or value < 1:
            raise ConfigError(f'kv_policy="{name}" has {size}={value!r:.80}: give a whole number, at least 1.')
