"""A model of the time of a pass: what is read from memory and disk, what is computed, and what waits for what.

Plain arithmetic over sizes and a machine's profile; docs/fit.md derives it. Knows nothing of how they were found.
"""

import itertools
import math
from typing import NamedTuple

from moeflow.fit.formats import StoredAs
from moeflow.fit.hit_curves import Range
from moeflow.fit.sizes import ModelSizes
from moeflow.kernels.quantization.formats import FORMATS
from moeflow.machine.profile import MANY_TOKENS, MachineProfile

READS_IN_FLIGHT = 4
_WIDE = 1.25  # how far beyond the range of hit rates speeds may lie
# Of the bits of GGML's blocks.
_OF_BITS = {8: "int8-g64", 6: "int8-g64", 5: "int4-g64", 4: "int4-g64", 3: "int3-g64", 2: "int2-g64", 1: "int2-g64"}
# Formats in whose place another is taken, where a profile has not measured them.
_NEAREST = {
    "mixed": "int3-g64", "bf16-lossless": "bf16", "float16": "bf16", "float64": "float32", "float32": "bf16",
    "fp8": "int8", "mxfp4": "int4-g64", "int4-g64": "int4", "int3-g64": "int4-g64", "int2-g64": "int3-g64",
    "int8": "int8-g64", "int8-g64": "int8",
    **{name: _OF_BITS[spec.bits] for name, spec in FORMATS.items() if spec.kind == "ggml"},
}  # fmt: skip
# Narrow formats are bound by arithmetic: bytes a second over those of the format in whose place they stand.
_SLOWER = {"int3-g64": 0.5, "int2-g64": 0.45, "int1-g64": 0.25}


class Load(NamedTuple):
    """The parts of one layer's experts in a pass.

    Args:
        num_experts: distinct ones that the pass demands, on average.
        compute_s: seconds of one expert that is in memory.
        read_bytes: of one expert on the disk.
        reads: pieces in which it lies there.
    """

    num_experts: float
    compute_s: float
    read_bytes: float
    reads: int


def union(num_experts: int, top_k: int, tokens: int) -> float:
    """Return how many distinct experts of a layer this many tokens demand, each choosing evenly."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


class SpeedModel:
    """Times of a model's passes on a machine.

    Args:
        sizes: of the model.
        form: how experts are stored.
        profile: of the machine.
    """

    def __init__(self, sizes: ModelSizes, form: StoredAs, profile: MachineProfile) -> None:
        self._sizes, self._form, self._profile = sizes, form, profile
        self._kernel = _kernel(form.kernel, profile)
        self._miss_s = profile.layer_s["missing"]  # of the runtime's Python: out of the native program and back

    def decode_s(self, hit_rate: float, *, batch: int = 1, context: int = 0) -> float:
        """Return the seconds of a decode step.

        Args:
            hit_rate: share of demanded experts that are resident.
            batch: sequences, one new token each.
            context: positions that each has.
        """
        return sum(self.decode_parts(hit_rate, batch=batch, context=context).values())

    def decode_parts(self, hit_rate: float, *, batch: int = 1, context: int = 0) -> dict[str, float]:
        """Return a decode step's seconds by what they go to."""
        sizes, profile = self._sizes, self._profile
        steps = profile.layer_s.get("native", profile.layer_s["python"])
        once = profile.step_s.get("native", profile.step_s.get("python", 0.0))
        memory = max(profile.memory_read.values(), default=profile.dense_read)
        dense = max(
            sizes.dense_read_bytes(self._form) / profile.dense_read,
            2 * batch * self._dense_weights / profile.dense_flops,
        )
        experts = sum(self.layer_s(self._load(layer.num_experts, layer, batch), hit_rate) for layer in sizes.layers)
        return {
            "dense": dense,
            "experts": experts,
            "attention": batch * sizes.key_value_bytes(context) / memory,
            "fixed": sizes.config.num_layers * steps + once,
        }

    def layer_s(self, load: Load, hit_rate: float) -> float:
        """Return the mean seconds of a layer's experts: those that are missed are read beside each other while the
        resident ones are computed, and the last to arrive is computed after it has.
        """
        count = max(round(load.num_experts), 1)
        scale, miss_rate = load.num_experts / count, 1 - hit_rate
        total = 0.0
        for misses in range(count + 1):
            share = math.comb(count, misses) * miss_rate**misses * hit_rate ** (count - misses)
            if share < 1e-12:
                continue
            compute = count * load.compute_s
            if misses:
                compute = max(compute, self._read_s(load, misses) + load.compute_s) + misses * self._miss_s
            total += share * compute
        return scale * total

    def prefill_s(self, tokens: int, expert_bytes: float = 0) -> float:
        """Return the seconds of a first prompt: nothing is resident, and every expert that it demands is read.

        Args:
            tokens: of the prompt.
            expert_bytes: that experts may take: memory that is written for the first time.
        """
        sizes, profile = self._sizes, self._profile
        experts = demanded = 0.0
        for layer in sizes.layers:
            load = self._load(layer.num_experts, layer, tokens)
            compute = load.num_experts * load.compute_s
            read = self._read_s(load, max(round(load.num_experts), 1))
            experts += max(compute, read + load.compute_s) + load.num_experts * self._miss_s
            demanded += load.num_experts * load.read_bytes
        touched = min(demanded, expert_bytes) / profile.memory_touch
        checked = demanded * self._first_check_s / profile.threads
        dense = max(
            2 * tokens * self._dense_weights / profile.dense_flops,
            sizes.dense_read_bytes(self._form) / profile.dense_read,
        )
        values = sum(sizes.config.attention.values)
        attention = 2 * tokens * tokens * values / profile.dense_flops
        fixed = sizes.config.num_layers * profile.layer_s["python"] + profile.step_s.get("python", 0.0)
        return experts + touched + checked + dense + attention + fixed

    def decode_tok_s(self, hit_rate: Range, *, batch: int = 1, context: int = 0) -> Range:
        """Return tokens a second of all sequences together: low, expected, high."""
        low, mid, high = (batch / self.decode_s(rate, batch=batch, context=context) for rate in hit_rate)
        return Range(low / _WIDE, mid, high * _WIDE)

    def prefill_tok_s(self, tokens: int, expert_bytes: float = 0) -> Range:
        """Return tokens a second of a first prompt: low, expected, high; arguments as of `prefill_s`."""
        rate = tokens / self.prefill_s(tokens, expert_bytes)
        return Range(rate / _WIDE, rate, rate * _WIDE)

    @property
    def _first_check_s(self) -> float:
        """Seconds of a core for a byte of an expert that is read for the first time."""
        rates, form = self._profile.first_check, self._form
        names = ["checksum"] * form.is_packed + ["lossless"] * (form.kernel == "bf16-lossless")
        return sum(1 / rates[name] for name in names if name in rates)

    @property
    def _dense_weights(self) -> float:
        if self._sizes.dense_matrix_values:
            return self._sizes.dense_matrix_values
        bits = 8 * self._sizes.dense_matrix_bytes
        return bits / {"F64": 64, "F32": 32}.get(self._sizes.dtype, 16)

    def _load(self, num_experts: int, layer, tokens: int) -> Load:
        count = union(num_experts, min(self._sizes.top_k, num_experts), tokens)
        each = tokens * self._sizes.top_k / count
        in_memory = layer.memory_bytes if self._form.is_published else self._form.slot_bytes(layer.shapes)
        stored = layer.stored_bytes if self._form.is_published else in_memory
        compute = self._expert_s(in_memory, layer.num_weights(), each)
        return Load(count, compute, stored, layer.pieces if self._form.is_published else 1)

    def _expert_s(self, num_bytes: float, num_weights: float, tokens: float) -> float:
        """Return the seconds of an expert in memory with so many tokens: between measured ones, a straight line."""
        many_s = 2 * MANY_TOKENS * num_weights / self._rate(self._profile.kernel_flops)
        times = {count: num_bytes / rate for count, rate in sorted(self._kernel.items())} | {MANY_TOKENS: many_s}
        if tokens >= MANY_TOKENS:
            return many_s * tokens / MANY_TOKENS
        for (left, few_s), (right, more_s) in itertools.pairwise(times.items()):
            if tokens <= right:
                return few_s + max(tokens - left, 0) / (right - left) * (more_s - few_s)
        raise AssertionError("more tokens were told above")

    def _read_s(self, load: Load, misses: int) -> float:
        """Return the seconds of reading this many experts beside each other."""
        profile, size = self._profile, load.read_bytes
        together = _between(profile.disk_read, size)
        alone = _between(profile.disk_read_alone or profile.disk_read, size)
        share = min(misses - 1, READS_IN_FLIGHT - 1) / (READS_IN_FLIGHT - 1)
        return misses * size / (min(alone, together) ** (1 - share) * together**share)

    def _rate(self, rates: dict[str, float]) -> float:
        return rates[_name(self._form.kernel, rates)]


def _kernel(kernel: str, profile: MachineProfile) -> dict[int, float]:
    name = _name(kernel, profile.kernel_read)
    stands_for = "int3-g64" if kernel == "mixed" else kernel
    share = 1.0 if name == stands_for else _SLOWER.get(stands_for, 1.0)
    return {tokens: share * rate for tokens, rate in profile.kernel_read[name].items()}


def _name(kernel: str, rates: dict) -> str:
    """Return the format of a profile that is nearest to a kernel's."""
    name, tried = kernel, set()
    while name not in rates and name not in tried:
        tried.add(name)
        name = _NEAREST.get(name, "bf16")
    return name if name in rates else next(iter(rates))


def _between(rates: dict[int, float], at: float) -> float:
    """Return a rate between two measured ones, on logarithmic scales; the nearest beyond them."""
    points = sorted(rates.items())
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if at <= right:
            share = math.log(at / left) / math.log(right / left)
            return math.exp(math.log(low) * (1 - share) + math.log(high) * share)
    return points[-1][1]
