"""The random models of the report: written once into the work folder, and loaded."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.plan import TINY
from gpu.routes import open_routes, routed_shape
from gpu.worker import Tell
from make_random_moe import Shape, write_random_moe


def shape_of(job: dict[str, Any]) -> Shape:
    """Return the shape of the run's models: with the experts of a trace's model where routes are replayed."""
    shape = TINY if job["dry"] else Shape()
    return shape if job["routes"] is None else routed_shape(shape, open_routes(job))


def folder_of(job: dict[str, Any], format: str) -> Path:
    """Return the folder of a model, which its shape names."""
    shape = shape_of(job)
    sizes = f"{shape.layers}x{shape.experts}-top{shape.top_k}-{shape.hidden}-{shape.inner}"
    return Path(job["work"]) / f"random-{sizes}-{format}"


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Write both models, unless they are there."""
    from moeflow.convert.quantize import quantize_model

    shape, folders = shape_of(job), {name: folder_of(job, name) for name in ("bfloat16", "int4")}
    begin = time.perf_counter()
    made = write_random_moe(folders["bfloat16"], shape)
    tell({"format": "bfloat16", "folder": str(folders["bfloat16"]), "made": made, "s": time.perf_counter() - begin})
    begin = time.perf_counter()
    made = not folders["int4"].is_dir()
    if made:
        quantize_model(folders["bfloat16"], folders["int4"], "int4-g32" if job["dry"] else "int4", method="rtn")
    tell({"format": "int4", "folder": str(folders["int4"]), "made": made, "s": time.perf_counter() - begin})
    return {"shape": shape._asdict(), "bytes": shape.num_bytes, "free_bytes": shutil.disk_usage(job["work"]).free}


@contextmanager
def loaded(job: dict[str, Any], format: str, **options: Any) -> Iterator[Any]:
    """Load a model of the report for a block, on the run's device.

    Args:
        job: of the step.
        format: "bfloat16" or "int4".
        **options: of load_moe.
    """
    import torch
    from transformers.utils import logging

    from moeflow import load_moe

    logging.disable_progress_bar()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    on_cpu = {"step": "python"} if job["device"] == "cpu" else {}
    model = load_moe(folder_of(job, format), device=job["device"], **on_cpu, **options)
    model.generation_config.eos_token_id = None
    try:
        yield model
    finally:
        model.moeflow.close()
        del model
        _free(job["device"])


def _free(device: str) -> None:
    """Give the card's memory back, so that the next load finds it."""
    import gc

    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def draw_prompt(model: Any, length: int, seed: int = 0) -> Any:
    """Draw the token ids of a prompt, [1, length], on the model's device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def generate(model: Any, prompt: Any, num_tokens: int, streamer: Any = None) -> list[int]:
    """Decode greedily, exactly this many tokens; return them."""
    import torch

    with torch.no_grad():
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0,
            streamer=streamer,
        )  # fmt: skip
    return found[0, prompt.shape[1] :].tolist()
