"""Runs a pass of a model so that on a GPU its decode steps ask the host for nothing while that pays."""

from collections.abc import Callable
from typing import Any

import torch

from moeflow.hf.passes.forward import ForwardPass
from moeflow.hf.passes.restore_point import restore_point
from moeflow.moe.triton_compute import MAX_PAIRED_TOKENS
from moeflow.offload.runtime import ExpertRuntime


def run_pass(runtime: ExpertRuntime, begun: ForwardPass, run: Callable[[], Any]) -> Any:
    """Run a pass that the runtime was told of.

    Args:
        runtime: of the model's experts.
        begun: the pass.
        run: runs it; again where the first time an expert was missed.

    Returns:
        What `run` returned.
    """
    trusting, is_step = runtime.trusting, begun.continues and begun.num_positions == 1
    if trusting is None or not is_step or begun.num_sequences > MAX_PAIRED_TOKENS or torch.is_grad_enabled():
        return run()
    is_watched = runtime.predicting or runtime.observers or runtime.parallel is not None
    restore = restore_point(begun.cache) if trusting.trust.pays and not is_watched else None
    if restore is None:
        return trusting.run_asking(run)
    with runtime.changing() as residency:
        made, missed = trusting.run(run, residency, runtime.resident_table)
    if not missed:
        return made
    restore()
    return run()
