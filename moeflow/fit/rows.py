"""What a person could do with a model, row by row: each way to store its experts at each budget, and what it gives.

Knows sizes, memory and speed. Knows nothing of the machine but its profile and its bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moeflow.fit.formats import StoredAs, other_formats
from moeflow.fit.hit_curves import HitCurve, Range
from moeflow.fit.memory import memory_lines, most_expert_bytes, usable
from moeflow.fit.sizes import ModelSizes
from moeflow.fit.speed import SpeedModel
from moeflow.machine.profile import MachineProfile

SHARES = (0.125, 0.25, 0.5, 1.0)
ENOUGH_TOK_S = 5.0  # from which a way that loses nothing is recommended before a faster one
_PROMPT_TOKENS = 512  # of the first prompt whose speed is told, at most half of the context
_MOST_BUDGET, _LEAST_BUDGET = "most", "least"


@dataclass(frozen=True)
class Wish:
    """What is asked of a model.

    Args:
        context: positions of a sequence.
        batch: sequences at once.
        memory_bytes: that the whole process may take.
        target_tok_s: decode speed that is wanted; None for none.
    """

    context: int
    batch: int
    memory_bytes: int
    target_tok_s: float | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the first prompt."""
        return max(min(_PROMPT_TOKENS, self.context // 2), 1)


@dataclass(frozen=True)
class Row:
    """One way to run a model.

    Args:
        form: how experts are stored.
        budget: "least", "most" (that fits), or a share as "25%".
        share: of all experts that is resident.
        disk_bytes: of the folder.
        lines: bytes of memory by use.
        memory_bytes: that the process may take.
        hit_rate: of decode steps.
        prefill_tok_s: of a first prompt.
        decode_tok_s: of all sequences together.
        bound: what takes most of a decode step: "disk", "experts", "dense", "attention" or "fixed".
    """

    form: StoredAs
    budget: str
    share: float
    disk_bytes: int
    lines: dict[str, int]
    memory_bytes: int
    hit_rate: Range
    prefill_tok_s: Range
    decode_tok_s: Range
    bound: str

    @property
    def total_bytes(self) -> int:
        """All lines together."""
        return sum(self.lines.values())

    @property
    def short_bytes(self) -> int:
        """What is missing of the memory; 0 where it fits."""
        return max(self.total_bytes - usable(self.memory_bytes), 0)

    @property
    def fits(self) -> bool:
        """Whether all lines together fit."""
        return not self.short_bytes

    def as_dict(self) -> dict:
        """Return what `json.dumps` takes."""
        ranges = {name: getattr(self, name)._asdict() for name in ("hit_rate", "prefill_tok_s", "decode_tok_s")}
        return {
            "format": self.form.name,
            "kernel": self.form.kernel,
            "exact": self.form.is_exact,
            "budget": self.budget,
            "share": round(self.share, 4),
            "disk_bytes": self.disk_bytes,
            "lines": self.lines,
            "total_bytes": self.total_bytes,
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "short_bytes": self.short_bytes,
            "bound": self.bound,
            **ranges,
        }


def make_rows(
    sizes: ModelSizes, wish: Wish, profile: MachineProfile, curve: HitCurve, *, shares: tuple[float, ...] = SHARES
) -> list[Row]:
    """Return every row: formats from the one that loses least, budgets from the smallest.

    Args:
        sizes: of the model.
        wish: what is asked.
        profile: of the machine.
        curve: hit rates.
        shares: of all experts, beside the least and the most that fits.
    """
    rows = []
    for form in (sizes.published, *other_formats(sizes.published)):
        make = row_maker(sizes, form, wish, profile, curve)
        all_bytes, least = sizes.experts_bytes(form), least_bytes(sizes, form)
        budgets = {f"{100 * share:g}%": int(share * all_bytes) for share in shares}
        most = most_expert_bytes(make(0, "").lines, wish.memory_bytes)
        if least <= most < all_bytes:
            budgets[_MOST_BUDGET] = most
        budgets = {name: held for name, held in budgets.items() if held > least} | {_LEAST_BUDGET: least}
        rows += [make(held, name) for name, held in sorted(budgets.items(), key=lambda item: item[1])]
    return rows


def row_maker(
    sizes: ModelSizes, form: StoredAs, wish: Wish, profile: MachineProfile, curve: HitCurve
) -> Callable[[int, str], Row]:
    """Return what makes the row of a format from the bytes that experts may take and the budget's name."""
    model, all_bytes = SpeedModel(sizes, form, profile), sizes.experts_bytes(form)

    def make(expert_bytes: int, budget: str) -> Row:
        share = min(expert_bytes / all_bytes, 1.0)
        rates = curve.at(share)
        parts = model.decode_parts(rates.mid, batch=wish.batch, context=wish.context // 2)
        computed = model.decode_parts(1.0, batch=wish.batch, context=wish.context // 2)["experts"]
        parts["disk"] = max(parts["experts"] - computed, 0)
        parts["experts"] = min(parts["experts"], computed)
        return Row(
            form=form,
            budget=budget,
            share=share,
            disk_bytes=sizes.file_bytes(form),
            lines=memory_lines(
                sizes,
                form,
                min(expert_bytes, all_bytes),
                context=wish.context,
                batch=wish.batch,
                process_bytes=profile.process_bytes,
            ),
            memory_bytes=wish.memory_bytes,
            hit_rate=rates,
            prefill_tok_s=model.prefill_tok_s(wish.prompt_tokens, expert_bytes),
            decode_tok_s=model.decode_tok_s(rates, batch=wish.batch, context=wish.context // 2),
            bound=max(parts, key=lambda name: parts[name]),
        )

    return make


def least_bytes(sizes: ModelSizes, form: StoredAs) -> int:
    """Return the bytes of the fewest experts that a token runs with: its own in one layer, and one in flight."""
    return min(sizes.top_k + 1, sizes.num_experts) * sizes.slot_bytes(form)


def recommend(rows: list[Row], wish: Wish) -> Row | None:
    """Choose a row: of those that fit, the one that loses least and is fast enough; else the fastest.

    Args:
        rows: all.
        wish: a target is what is fast enough.
    """
    fitting = [row for row in rows if row.fits]
    enough = ENOUGH_TOK_S if wish.target_tok_s is None else wish.target_tok_s
    good = [row for row in fitting if row.decode_tok_s.mid >= enough]
    if good:
        rank = min(row.form.rank for row in good)
        return max((row for row in good if row.form.rank == rank), key=_worth)
    return max(fitting, key=_worth, default=None)


def _worth(row: Row) -> tuple[float, int]:
    """Order rows by speed to three digits, then by how little they ask the user to write anew."""
    return float(f"{row.decode_tok_s.mid:.2g}"), int(row.form.is_published)
