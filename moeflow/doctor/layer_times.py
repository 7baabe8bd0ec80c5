"""A program that measures what a layer of a decode step takes beside its weights. It prints one JSON object.

Two models with next to no weights differ in layers alone, so that the difference of their steps is the layers'. Between
steps a block of memory is read, as a large model's weights are: what Python uses is not in the processor's caches then.
One of the models runs once more with room for hardly any expert, so that its layers miss. It is run in a process of its
own, whose memory is that of a loaded model without weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

_FEW, _MANY = 2, 6  # layers
_PROMPT_TOKENS, _LEAST_STEPS = 16, 16
_CLOCK_S = 1e-6  # below it nothing is told apart
_EXPERTS, _TOP_K = 8, 2
_BARE = f"{100 * (_TOP_K + 1.5) / (_MANY * _EXPERTS)}%"  # room for three experts of all layers


def main(argv: list[str] | None = None) -> int:
    """Measure, and print {"layer_s": {mode: seconds}, "step_s": {mode: seconds}, "process_bytes": n}.

    "missing" among the layers is what comes on top for each expert that is missed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="for the steps of both models in both modes")
    arguments = parser.parse_args(argv)
    from moeflow.hardware import process_memory_bytes

    layer_s: dict[str, float] = {}
    step_s: dict[str, float] = {}
    process_bytes = 0
    with tempfile.TemporaryDirectory(prefix="moeflow-") as folder:
        models = {count: _written(Path(folder) / str(count), count) for count in (_FEW, _MANY)}
        for mode, step in (("native", "auto"), ("python", "python")):
            small, large = (_step(models[count], step, arguments.seconds / 5) for count in (_FEW, _MANY))
            if small is None or large is None:
                continue
            few, many = small.seconds, large.seconds
            # Where others disturb so much that the larger model seems faster, all of its step counts as layers.
            layer_s[mode] = (many - few) / (_MANY - _FEW) if many > few else many / _MANY
            step_s[mode] = max(few - _FEW * layer_s[mode], _CLOCK_S)
            process_bytes = process_bytes or process_memory_bytes()[0]
            if "missing" not in layer_s:  # in the mode that models run in
                bare = _step(models[_MANY], step, arguments.seconds / 5, room=_BARE)
                assert bare is not None, "it ran with all experts"
                layer_s["missing"] = max((bare.seconds - bare.stall_s - many) / max(bare.misses, 1), _CLOCK_S)
    print(json.dumps({"layer_s": layer_s, "step_s": step_s, "process_bytes": process_bytes}))
    return 0


def _written(folder: Path, num_layers: int) -> Path:
    """Write a Mixtral of tiny matrices."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=_EXPERTS, num_experts_per_tok=_TOP_K, vocab_size=128,
        max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


class _Step(NamedTuple):
    """A decode step: its median seconds, those of them that it waited for reads, and how many experts it missed."""

    seconds: float
    stall_s: float
    misses: float


def _step(folder: Path, step: str, seconds: float, room: str = "100%") -> _Step | None:
    """Return the decode step of generate() with room for experts; None where no native program ran it."""
    import torch

    from moeflow.loading.load_moe import load_moe

    model = load_moe(folder, device="cpu", expert_memory=room, predictor=None, step=step)
    with model.moeflow:
        if step == "auto":
            model.moeflow.step.prepare()
        clock = _Clock(seconds)
        prompt = torch.arange(_PROMPT_TOKENS).unsqueeze(0)
        model.generate(prompt, do_sample=False, max_new_tokens=2048, eos_token_id=None, stopping_criteria=[clock])
        if step == "auto" and not model.moeflow.step.num_steps:
            return None
        decode = model.moeflow.stats()["decode"]
        steps = max(decode["forwards"], 1)
        return _Step(clock.median_s(), decode["stall_s"] / steps, decode["misses"] / steps)


class _Clock:
    """A stopping criterion of generate() that notes when each token was there."""

    def __init__(self, seconds: float) -> None:
        import torch

        from moeflow.machine.measuring.memory import beyond_cache_bytes

        self._seconds = seconds
        self._begun: list[float] = []
        self._ended: list[float] = []
        self._block = torch.ones(beyond_cache_bytes(2) // 8, dtype=torch.int64)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self._ended.append(time.perf_counter())
        enough = len(self._ended) > _LEAST_STEPS + 2 and self._ended[-1] - self._ended[0] > self._seconds
        self._block.sum()
        self._begun.append(time.perf_counter())
        return torch.full((len(input_ids),), enough, dtype=torch.bool)

    def median_s(self) -> float:
        """Return the median of the steps, without the first two: they prepare."""
        return statistics.median(end - begin for begin, end in zip(self._begun[2:], self._ended[3:], strict=False))


if __name__ == "__main__":
    raise SystemExit(main())
