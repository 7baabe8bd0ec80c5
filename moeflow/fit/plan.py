"""A plan: what a model may take on a machine, line by line, how it is loaded, and the speed that is expected of it.

Written as JSON that carries its checksum. Knows numbers. Knows nothing of how they were found.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moeflow.atomic_file import NO_CHECKSUM, is_sealed, seal, write_atomically
from moeflow.errors import ConfigError
from moeflow.fit.memory import LINES
from moeflow.formatting import brief

FORMAT = 1
_AGAIN = "Make it again: moeflow fit MODEL -o PLAN"


@dataclass(frozen=True)
class Plan:
    """What `moeflow.fit` recommends and `load_moe(plan=)` obeys.

    Args:
        model: fingerprint of the model's config.
        model_type: of the config, for messages.
        stored: weight format in which the folder's experts must lie, as a machine's profile names it.
        machine: what the plan was made for, as a machine's profile describes it.
        memory_bytes: that the whole process may take.
        context: positions of a sequence.
        batch: sequences at once.
        lines: bytes by use: "dense", "experts", "key_values", "activations", "workspace", "pinned", "process".
        options: of load_moe: "device", "expert_memory", "kv_memory".
        expected: "prefill_tok_s" and "decode_tok_s", each [low, expected, high], "hit_rate" the same, "prompt_tokens"
            of the prompt, and "curve", whose routing the hit rate is of.
        format: version of this form.
    """

    model: str
    model_type: str
    stored: str
    machine: str
    memory_bytes: int
    context: int
    batch: int
    lines: dict[str, int]
    options: dict[str, Any]
    expected: dict[str, Any]
    format: int = FORMAT

    @property
    def total_bytes(self) -> int:
        """All lines together."""
        return sum(self.lines.values())

    def to_json(self) -> str:
        """Return the plan as JSON with a checksum of its text."""
        content = json.dumps({"crc32": NO_CHECKSUM, "plan": asdict(self)}, indent=1)
        return seal(content.encode()).decode()

    def save(self, file: str | Path) -> None:
        """Write the plan, whole or not at all.

        Raises:
            MoeflowError: it cannot be written.
        """
        write_atomically(Path(file), self.to_json().encode())

    @classmethod
    def from_json(cls, text: str | bytes, *, name: str = "the plan") -> "Plan":
        """Read a plan.

        Raises:
            ConfigError: not a plan, another version's, or changed since it was written.
        """
        content = text.encode() if isinstance(text, str) else text
        try:
            found = json.loads(content)
            plan, _ = found["plan"], found["crc32"]
            if not isinstance(plan, dict):
                raise TypeError("its plan is no object")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{name} is no plan ({brief(f'{type(error).__name__}: {error}')}). {_AGAIN}.") from None
        if plan.get("format") != FORMAT:
            raise ConfigError(f"{name} has format {plan.get('format')!r:.20}, this moeflow reads {FORMAT}. {_AGAIN}.")
        if not is_sealed(content):
            raise ConfigError(
                f"{name} was changed since it was written: its checksum does not agree. {_AGAIN}, with the options "
                "that you want (--memory, --context, --batch)."
            )
        return cls._checked(plan, name)

    @classmethod
    def load(cls, file: str | Path) -> "Plan":
        """Read a plan's file.

        Raises:
            ConfigError: it cannot be read, or as `from_json` says.
        """
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(f"the plan {file} cannot be read: {error.strerror}. {_AGAIN}.") from error
        return cls.from_json(content, name=str(file))

    @classmethod
    def _checked(cls, plan: dict[str, Any], name: str) -> "Plan":
        names = {one.name for one in fields(cls)}
        if set(plan) != names:
            raise ConfigError(f"{name} misses or has beyond a plan: {brief(sorted(set(plan) ^ names))}. {_AGAIN}.")
        lines = plan["lines"]
        if not isinstance(lines, dict) or set(lines) != set(LINES):
            raise ConfigError(f"{name} has other lines than {', '.join(LINES)}. {_AGAIN}.")
        for line, value in (*lines.items(), *((key, plan[key]) for key in ("memory_bytes", "context", "batch"))):
            if type(value) is not int or value < 0:
                raise ConfigError(f"{name}: {line} is {value!r:.40}; it must be a whole number. {_AGAIN}.")
        if not isinstance(plan["options"], dict) or not isinstance(plan["expected"], dict):
            raise ConfigError(f"{name}: options and expected must be objects. {_AGAIN}.")
        return cls(**plan)
