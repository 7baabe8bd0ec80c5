"""fit(): the plan for a model on this machine, and the survey of all ways to run it.

Knows the order of the steps. Knows nothing of how each is done.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moeflow import hardware
from moeflow.errors import BudgetError, ConfigError
from moeflow.fit.hit_curves import HitCurve, curve_for, curve_of_trace
from moeflow.fit.memory import LOADING_BYTES, usable
from moeflow.fit.plan import Plan
from moeflow.fit.rows import Row, Wish, make_rows, recommend
from moeflow.fit.sizes import ModelSizes
from moeflow.fit.source import model_source
from moeflow.formatting import format_bytes
from moeflow.machine.measure import measure_profile
from moeflow.machine.profile import MachineProfile
from moeflow.machine.store import kept_profile
from moeflow.memory_size import MemorySize, parse_memory

DEFAULT_CONTEXT = 4096
_QUICK_S = 4.0
_DEVICES = ("auto", "cpu")


@dataclass(frozen=True)
class Survey:
    """All ways to run a model here.

    Args:
        model: as it was asked for.
        sizes: of the model.
        wish: what was asked.
        profile: of the machine.
        curve: hit rates, and whose.
        rows: all ways.
        recommended: the row to take; None where nothing fits.
        gguf_file: the GGUF file that was chosen; None for none.
    """

    model: str
    sizes: ModelSizes
    wish: Wish
    profile: MachineProfile
    curve: HitCurve
    rows: list[Row]
    recommended: Row | None
    gguf_file: str | None = None

    def plan(self, row: Row | None = None) -> Plan:
        """Return the plan of a row, by default of the recommended one.

        Raises:
            BudgetError: nothing fits.
        """
        row = self.recommended if row is None else row
        if row is None:
            raise BudgetError(self.why_not())
        sizes = self.sizes
        return Plan(
            model=sizes.config.fingerprint,
            model_type=sizes.config.model_type,
            stored=row.form.kernel,
            machine=self.profile.hardware,
            memory_bytes=row.memory_bytes,
            context=self.wish.context,
            batch=self.wish.batch,
            lines=row.lines,
            options={
                "device": "cpu",
                "expert_memory": row.lines["experts"],
                "kv_memory": row.lines["key_values"],
            },
            expected={
                "prefill_tok_s": list(row.prefill_tok_s),
                "decode_tok_s": list(row.decode_tok_s),
                "hit_rate": list(row.hit_rate),
                "prompt_tokens": self.wish.prompt_tokens,
                "curve": self.curve.source,
            },
        )

    def why_not(self) -> str:
        """Say what the smallest way lacks."""
        least = min(self.rows, key=lambda row: row.total_bytes)
        held = {name: format_bytes(value) for name, value in least.lines.items()}
        return (
            f"{self.model} does not fit in {format_bytes(self.wish.memory_bytes)}: its smallest way "
            f"({least.form.name}, {held['experts']} for experts) takes {format_bytes(least.total_bytes)} beside 3 % of "
            f"slack, {format_bytes(least.short_bytes)} too many; {held['dense']} of it are weights that are "
            "never left on disk. Give a smaller context, or a machine with more memory."
        )


def survey(
    model: str | Path,
    *,
    context: int | None = None,
    batch: int = 1,
    device: str = "auto",
    memory: MemorySize | None = None,
    disk: str | Path | None = None,
    target: float | None = None,
    trace: str | Path | None = None,
    gguf_file: str | None = None,
    profile: MachineProfile | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Survey:
    """Find all ways to run a model on this machine; arguments and errors are those of `fit`, and further:

    Args:
        model: as in `fit`.
        context: as in `fit`.
        batch: as in `fit`.
        device: as in `fit`.
        memory: as in `fit`.
        disk: as in `fit`.
        target: as in `fit`.
        trace: as in `fit`.
        gguf_file: as in `fit`.
        profile: of the machine; kept or measured when None.
        tell: called with what takes long, before it.
    """
    if device not in _DEVICES:
        raise ConfigError(
            f"device={device!r:.40} is not planned. Allowed: {', '.join(_DEVICES)}. On a GPU load_moe divides memory "
            "by itself, from what it measures there."
        )
    for name, value in (("context", context), ("batch", batch)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name}={value!r:.40} is not a count. Give a whole number of 1 or more.")
    if target is not None and (isinstance(target, bool) or not 0 < target < float("inf")):
        raise ConfigError(f"target={target!r:.40} is no speed. Give tokens a second, above 0.")
    with model_source(model, tell, gguf_file) as (sizes, folder):
        most = sizes.config.context
        wish = Wish(
            context=context or min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT),
            batch=batch,
            memory_bytes=_memory_bytes(memory),
            target_tok_s=None if target is None else float(target),
        )
        if most is not None and wish.context > most:
            raise ConfigError(f"context={wish.context} is more than the {most} positions that the model was made for.")
        place = folder if disk is None else Path(disk)
        profile = profile or _profile(place, tell)
        curve = _curve(sizes, trace)
    if "torch" in sys.modules:  # the model will be loaded beside what this process holds already
        held = hardware.process_memory_bytes()[0] + LOADING_BYTES
        profile = replace(profile, process_bytes=max(profile.process_bytes, held))
    rows = make_rows(sizes, wish, profile, curve)
    return Survey(str(model), sizes, wish, profile, curve, rows, recommend(rows, wish), gguf_file)


def fit(
    model: str | Path,
    *,
    context: int | None = None,
    batch: int = 1,
    device: str = "auto",
    memory: MemorySize | None = None,
    disk: str | Path | None = None,
    target: float | None = None,
    trace: str | Path | None = None,
    gguf_file: str | None = None,
) -> Plan:
    """Plan how a model runs on this machine, from its headers alone: memory by lines, and the speed to expect.

    `load_moe(model, plan=plan)` obeys the plan. Where the plan's format is not the folder's (`plan.stored`), the folder
    must be written anew first, by `moeflow pack` or `moeflow quantize`; `moeflow fit` prints the commands.

    Args:
        model: a hub id, a checkpoint folder, or one written by `moeflow pack` or `moeflow quantize`.
        context: positions of a sequence, prompt and answer; 4096, or what the model was made for, when None.
        batch: sequences at once.
        device: "auto" or "cpu". Plans are made for the CPU only.
        memory: that the whole process may take, in bytes or as "6GiB"; what is free here when None.
        disk: a folder on the disk that experts will be read from; the model's own when None.
        target: tokens a second that decoding must reach.
        trace: a routing trace of the model, for its hit rates; those of the most similar measured model when None.
        gguf_file: name of the GGUF file to take, of a hub id or of a folder with several.

    Returns:
        The recommended plan: of those that fit, the one that loses least and is fast enough.

    Raises:
        BudgetError: nothing fits, or no plan that fits reaches the target; the message says what is short.
        ConfigError: an option is malformed.
        ModelSourceError, CheckpointError, UnsupportedModelError: the model is not there, damaged or dense.
        TraceError: the trace is damaged, or of another model.
    """
    found = survey(
        model, context=context, batch=batch, device=device, memory=memory, disk=disk, target=target, trace=trace,
        gguf_file=gguf_file,
    )  # fmt: skip
    if target is not None and found.recommended is not None and found.recommended.decode_tok_s.mid < target:
        raise BudgetError(out_of_reach(found))
    return found.plan()


def out_of_reach(found: Survey) -> str:
    """Say what bounds the fastest row, where none that fits reaches the target."""
    row, wish = found.recommended, found.wish
    assert row is not None, "something fits"
    assert wish.target_tok_s is not None, "a speed was asked for"
    what = {
        "disk": f"reading missed experts from the disk ({found.profile.disk}): more memory, or a faster disk",
        "experts": "reading experts from memory: a narrower format, or faster memory",
        "dense": "reading dense weights from memory: faster memory",
        "attention": "reading keys and values: a shorter context",
        "fixed": "the fixed work of its layers: a faster processor",
    }[row.bound]
    return (
        f"no way that fits reaches {wish.target_tok_s:g} tok/s: the fastest ({row.form.name}, "
        f"{format_bytes(row.lines['experts'])} for experts) is expected to reach {row.decode_tok_s.mid:.1f}. Most "
        f"of its step goes to {what} would help."
    )


def _memory_bytes(memory: MemorySize | None) -> int:
    """Return what a whole process may take: by the user's word, else what is free beside this one."""
    if memory is None:
        free = hardware.available_memory_bytes() + hardware.process_memory_bytes()[0]
        return min(free, hardware.memory_limit_bytes())
    if isinstance(memory, str) and memory.endswith("%"):
        raise ConfigError(f'memory={memory!r:.40} is a share of nothing: give bytes, or as in "6GiB".')
    found = parse_memory(memory, name="memory", whole_bytes=0)
    if usable(found) < 1:
        raise ConfigError(f'memory={memory!r:.40} is none. Give bytes, or as in "6GiB".')
    return found


def _profile(place: Path, tell: Callable[[str], None]) -> MachineProfile:
    """Return the machine's profile: kept, or measured quickly now."""
    kept = kept_profile(place)
    if kept is not None:
        return kept
    tell(f"measuring this machine for about {_QUICK_S:g} s (moeflow doctor --measure takes 20 s and says more)")
    return measure_profile(place, seconds=_QUICK_S)


def _curve(sizes: ModelSizes, trace: str | Path | None) -> HitCurve:
    """Return the hit rates of the model's own trace, else of the nearest measured model."""
    count = max(layer.num_experts for layer in sizes.layers)
    if trace is None:
        return curve_for(count, sizes.top_k)
    return curve_of_trace(Path(trace), of=(len(sizes.layers), count, sizes.top_k))
