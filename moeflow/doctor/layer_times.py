"""A program that measures what a layer of a decode step takes beside its weights. It prints one JSON object.

Two models with next to no weights differ in layers alone, so that the difference of their steps is the layers'. It is
run in a process of its own, whose memory is that of a loaded model without weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

_FEW, _MANY = 2, 6  # layers
_PROMPT_TOKENS, _LEAST_STEPS = 16, 16
_CLOCK_S = 1e-6  # below it nothing is told apart


def main(argv: list[str] | None = None) -> int:
    """Measure, and print {"layer_s": {mode: seconds}, "step_s": {mode: seconds}, "process_bytes": n}."""
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
            few, many = (_step_seconds(models[count], step, arguments.seconds / 4) for count in (_FEW, _MANY))
            if few is None or many is None:
                continue
            # Where others disturb so much that the larger model seems faster, all of its step counts as layers.
            layer_s[mode] = (many - few) / (_MANY - _FEW) if many > few else many / _MANY
            step_s[mode] = max(few - _FEW * layer_s[mode], _CLOCK_S)
            process_bytes = process_bytes or process_memory_bytes()[0]
    print(json.dumps({"layer_s": layer_s, "step_s": step_s, "process_bytes": process_bytes}))
    return 0


def _written(folder: Path, num_layers: int) -> Path:
    """Write a Mixtral of tiny matrices."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=128,
        max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def _step_seconds(folder: Path, step: str, seconds: float) -> float | None:
    """Return the median time of a decode step in generate(); None where no native program ran it."""
    import torch

    from moeflow.loading.load_moe import load_moe

    model = load_moe(folder, device="cpu", expert_memory="100%", predictor=None, step=step)
    with model.moeflow:
        if step == "auto":
            model.moeflow.step.prepare()
        clock = _Clock(seconds)
        prompt = torch.arange(_PROMPT_TOKENS).unsqueeze(0)
        model.generate(prompt, do_sample=False, max_new_tokens=2048, eos_token_id=None, stopping_criteria=[clock])
        if step == "auto" and not model.moeflow.step.num_steps:
            return None
        return clock.median_s()


class _Clock:
    """A stopping criterion of generate() that notes when each token was there."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self._times.append(time.perf_counter())
        enough = len(self._times) > _LEAST_STEPS + 2 and self._times[-1] - self._times[0] > self._seconds
        return torch.full((len(input_ids),), enough, dtype=torch.bool)

    def median_s(self) -> float:
        """Return the median of the steps, without the first two: they prepare."""
        return statistics.median(b - a for a, b in zip(self._times[2:], self._times[3:], strict=False))


if __name__ == "__main__":
    raise SystemExit(main())
