"""The contract between a plan and a loaded model: what is refused, what each line may take, and what it took.

Knows a plan and bytes. Knows nothing of modules, tiers or engines, which charge what they take.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from moeflow import hardware
from moeflow.errors import BudgetError, ConfigError
from moeflow.fit.config_facts import read_config
from moeflow.fit.memory import pass_tokens
from moeflow.fit.plan import Plan
from moeflow.formatting import format_bytes
from moeflow.machine.identity import hardware as machine_name

_ROUNDING_SHARE, _ROUNDING_BYTES = 0.02, 1 << 16  # that a line may be over: sizes by headers leave paddings out
_WITHIN_PROCESS = ("activations", "workspace")  # lines whose bytes cannot be told apart from the process's
_AGAIN = "Make a plan for it: moeflow fit {model} -o PLAN"


class Phase(Protocol):
    """The counters of one phase that a contract tells of."""

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of the passes whose time is known."""

    @property
    def hit_rate(self) -> float | None:
        """Share of the demands that were resident."""


class Pass(Protocol):
    """What a contract looks at of a pass of the model."""

    @property
    def num_sequences(self) -> int:
        """Rows."""

    @property
    def num_positions(self) -> int:
        """New tokens of each row."""

    @property
    def num_kept(self) -> int | None:
        """Positions of each row before; None where an engine keeps them, whose memory is charged as a whole."""


class Contract:
    """What a model was planned to take, and what it takes, line by line.

    Args:
        plan: that the model is loaded by.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._charged: dict[str, int] = {}
        self._watched: dict[str, Callable[[], int | None]] = {}

    def get(self, name: str, default: int) -> int:
        """Return the bytes of keys and values, as an engine asks for them: "key_value_bytes"."""
        return self.plan.lines["key_values"] if name == "key_value_bytes" else default

    def options(self, **given: Any) -> list[Any]:
        """Return options of load_moe as the plan has them.

        Args:
            given: what the user gave, by name; "auto" leaves it to the plan.

        Raises:
            ConfigError: the user gave another value than the plan's.
        """
        for name, value in given.items():
            if str(value) not in ("auto", str(self.plan.options[name])):
                raise ConfigError(
                    f"{name}={value!r:.40} was given beside a plan, which has {self.plan.options[name]!r}. Give one of "
                    "the two."
                )
        return [self.plan.options[name] for name in given]

    def check_model(self, folder: Path) -> None:
        """Refuse a plan of another model or machine, before anything large is read.

        Args:
            folder: of the model.

        Raises:
            ConfigError: the plan is of another model or machine; the message names both.
            BudgetError: this process has less memory than the plan takes, or holds more already than it may.
        """
        plan, found = self.plan, read_config(folder)
        again = _AGAIN.format(model=folder)
        if found.fingerprint != plan.model:
            raise ConfigError(
                f"the plan is of another model: of a {plan.model_type} with fingerprint {plan.model}, and {folder} is "
                f"a {found.model_type} with {found.fingerprint}. {again}."
            )
        here = machine_name()
        if _machine_alone(here) != _machine_alone(plan.machine):
            raise ConfigError(f"the plan is of another machine: {plan.machine}; this one is {here}. {again}.")
        held = hardware.process_memory_bytes()[0]
        if held > plan.lines["process"]:
            raise BudgetError(
                f"process: this process holds {held:,} bytes before the model is loaded, and the plan has "
                f"{plan.lines['process']:,} for it. Load in a process of its own, or make the plan here: moeflow.fit()."
            )
        have = min(hardware.available_memory_bytes() + held, hardware.memory_limit_bytes())
        if plan.total_bytes > have:
            worst = max(plan.lines, key=lambda line: plan.lines[line])
            raise BudgetError(
                f"the plan takes {plan.total_bytes:,} bytes, most of them for {worst} ({plan.lines[worst]:,}), and "
                f"{have:,} are free in the limits of this process. {again}."
            )

    def check_stored(self, stored: str) -> None:
        """Refuse experts that are stored in another format than planned.

        Args:
            stored: the format, as a machine's profile names it.

        Raises:
            ConfigError: the message says what to write.
        """
        if stored != self.plan.stored:
            how = "moeflow pack --lossless" if "lossless" in self.plan.stored else "moeflow quantize"
            raise ConfigError(
                f"the plan is for experts in {self.plan.stored}, and these are in {stored}. Write the folder with "
                f"{how} and load that, or make a plan for this one: moeflow fit."
            )

    def charge(self, line: str, num_bytes: int) -> None:
        """Take bytes of a line.

        Args:
            line: of the plan.
            num_bytes: all that the line takes now.

        Raises:
            BudgetError: more than the line has.
        """
        planned = self.plan.lines[line]
        if num_bytes > planned * (1 + _ROUNDING_SHARE) + _ROUNDING_BYTES:
            raise BudgetError(
                f"{line}: {num_bytes:,} bytes are needed, and the plan has {planned:,} for this line. Make a plan with "
                "more: moeflow fit with a larger --context, --batch or --memory."
            )
        self._charged[line] = num_bytes

    @property
    def pass_tokens(self) -> int:
        """The most tokens of one pass."""
        return pass_tokens(self.plan.context, self.plan.batch)

    def check_pass(self, begun: Pass) -> None:
        """Refuse a pass that is longer, or whose sequences are, than planned. Nothing is computed then.

        Args:
            begun: the pass.

        Raises:
            BudgetError: names the line that it would go over.
        """
        plan, tokens = self.plan, begun.num_sequences * begun.num_positions
        if tokens > self.pass_tokens:
            raise BudgetError(
                f"activations: a pass of {tokens:,} tokens is asked for, and the plan has room for "
                f"{self.pass_tokens:,}. Give a shorter prompt or fewer at once, or make a plan with more: moeflow fit "
                "--context."
            )
        if begun.num_kept is None:
            return
        positions, most = begun.num_sequences * (begun.num_kept + begun.num_positions), plan.context * plan.batch
        if positions > most:
            raise BudgetError(
                f"key_values: {positions:,} positions would be kept, and the plan has {most:,} ({plan.batch} x "
                f"{plan.context:,}). Ask for fewer new tokens, or make a plan with more: moeflow fit "
                "--context, --batch."
            )

    def watch(self, line: str, read: Callable[[], int | None]) -> None:
        """Have a line's bytes read when they are told.

        Args:
            line: of the plan.
            read: returns its peak; None once it is gone.
        """
        self._watched[line] = read

    def told(self, memory: dict[str, int], prefill: Phase, decode: Phase) -> dict[str, Any]:
        """Return planned and actual by line, in bytes, and the speeds in tokens a second.

        Activations and the program's workspace cannot be told apart from the process: its actual bytes, what the peak
        has beyond the other lines, hold all three.

        Args:
            memory: of a runtime's statistics.
            prefill: counters.
            decode: counters.
        """
        actual: dict[str, int | None] = dict.fromkeys(self.plan.lines)
        actual |= self._charged
        actual["experts"], actual["pinned"] = memory["device_peak_bytes"], memory["staging_bytes"]
        for line, read in self._watched.items():
            actual[line] = read()
        known = sum(value for line, value in actual.items() if value is not None)
        peak = memory["process_peak_bytes"]
        actual["process"] = max(peak - known, 0)
        lines = {
            line: {"planned_bytes": planned, "actual_bytes": actual[line]} for line, planned in self.plan.lines.items()
        }
        expected = self.plan.expected
        speeds = {
            "prefill_tok_s": {"planned": expected["prefill_tok_s"], "actual": prefill.tokens_per_s},
            "decode_tok_s": {"planned": expected["decode_tok_s"], "actual": decode.tokens_per_s},
            "hit_rate": {"planned": expected["hit_rate"], "actual": decode.hit_rate},
        }
        total = {"planned_bytes": self.plan.total_bytes, "actual_bytes": peak}
        return {"key_value_bytes": self.plan.lines["key_values"], "lines": lines, "total": total, **speeds}


def plan_of(given: Plan | str | Path) -> Plan:
    """Return the plan that an option names.

    Args:
        given: a plan or its file.

    Raises:
        ConfigError: no plan, or one that was changed.
    """
    if isinstance(given, Plan):
        return given
    if isinstance(given, (str, Path)) and given != "":
        return Plan.load(given)
    raise ConfigError(f"plan is {given!r:.80}; it must be a plan of moeflow.fit, or the file of one.")


def summary(told: dict[str, Any]) -> str:
    """Write planned against actual as lines of text, for the end of a chat.

    Args:
        told: by `Contract.told`.
    """
    parts, within = [], 0
    for line, values in (*told["lines"].items(), ("sum", told["total"])):
        actual, planned = values["actual_bytes"], values["planned_bytes"]
        if line in _WITHIN_PROCESS:
            within += planned
            continue
        took = "-" if actual is None else format_bytes(actual)
        name, planned = ("process and passes", planned + within) if line == "process" else (line, planned)
        parts.append(f"{name.replace('_', ' ')} {took} of {format_bytes(planned)}")
    speeds = []
    for name in ("prefill_tok_s", "decode_tok_s"):
        low, mid, high = told[name]["planned"]
        actual = told[name]["actual"]
        took = "-" if actual is None else f"{actual:.3g}"
        speeds.append(f"{name.partition('_')[0]} {took} tok/s, planned {mid:.3g} ({low:.2g} to {high:.2g})")
    return f"plan: {' · '.join(parts)}\n      {' · '.join(speeds)}"


def _machine_alone(text: str) -> list[str]:
    """Return what a machine is, without limits of memory and threads, which a plan checks for itself."""
    return [part for part in text.split(", ") if not part.endswith(" memory") and "=" not in part]
