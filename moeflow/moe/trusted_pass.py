"""Runs a pass of a model so that on a GPU its decode steps ask the host for nothing while that pays."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.modules import module as of_all_modules

from moeflow.hf.passes.caches.step_cache import stepping
from moeflow.hf.passes.forward import ForwardPass
from moeflow.hf.passes.restore_point import restore_point
from moeflow.moe.triton_compute import MAX_PAIRED_TOKENS
from moeflow.offload.runtime import ExpertRuntime

_GLOBAL_HOOKS = (of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks)
_STEPS_A_LOOK = 64  # after which a model is looked through for other modules


class Hooks:
    """Looks for hooks in a model: they would see a step that is run again twice, the first time with wrong values.

    Args:
        model: whose modules are looked at; those that come later are found after some steps.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._hooks: list[dict] = []  # of all modules, which are not held: the model holds this object
        self._steps_left = 0

    def are_there(self, but: Callable[[object], bool] | None = None) -> bool:
        """Whether a forward hook waits for the next step, but for those of which `but` says so."""
        model = self._model()
        if self._steps_left <= 0 and model is not None:
            self._hooks = [hooks for one in model.modules() for hooks in (one._forward_hooks, one._forward_pre_hooks)]
            self._steps_left = _STEPS_A_LOOK
        self._steps_left -= 1
        if but is None:
            return any(_GLOBAL_HOOKS) or any(self._hooks)
        return any(_GLOBAL_HOOKS) or any(not but(hook) for hooks in self._hooks for hook in hooks.values())


def run_pass(
    runtime: ExpertRuntime,
    hooks: Hooks,
    begun: ForwardPass,
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """Run a pass that the runtime was told of.

    Args:
        runtime: of the model's experts.
        hooks: of the model.
        begun: the pass.
        forward: runs it; again where the first time an expert was missed.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        What `forward` returned.
    """
    trusting, is_step = runtime.trusting, begun.continues and begun.num_positions == 1
    run = partial(forward, *args, **kwargs)
    if trusting is None or not is_step:
        return run()
    if begun.num_sequences > MAX_PAIRED_TOKENS or torch.is_grad_enabled():
        for captured in filter(None, (trusting.graphs, trusting.pieces)):
            captured.reason = f"more than {MAX_PAIRED_TOKENS} sequences, or gradients are on"
        return run()
    with stepping(begun) as standing:
        why_not = _why_not_trusted(runtime, hooks)
        restore = restore_point(begun.cache) if why_not is None else None
        no_memory = f"the last step's cache is a {type(begun.cache).__name__}, which does not stay where it is"
        if trusting.graphs is not None:
            trusting.graphs.reason = why_not or (no_memory if standing is None else None)

        def ask() -> Any:
            pieces = trusting.pieces
            if pieces is None:
                return run()
            pieces.reason = no_memory if standing is None else _why_not_in_pieces(runtime, hooks)
            if standing is None or pieces.reason is not None:
                return run()
            kind = runtime.predicting  # which has hooks that are captured, and more to copy
            return pieces.run(trusting.begin_asking, standing, forward, args, kwargs, kind=kind)

        if restore is None:
            return trusting.run_asking(ask)
        trusted = run
        if trusting.graphs is not None and standing is not None:
            trusted = partial(trusting.graphs.run, trusting.begin, standing, forward, args, kwargs)
        with runtime.changing() as residency:
            made, missed = trusting.run(trusted, residency, runtime.resident_table)
        if not missed:
            return made
        restore()
        return ask()


def _why_not_trusted(runtime: ExpertRuntime, hooks: Hooks) -> str | None:
    """Say why a decode step must ask; None where it is trusted."""
    if runtime.predicting:
        return "steps are predicted"
    if runtime.observers or runtime.parallel is not None:
        return "steps are observed, or experts are spread over processes"
    if runtime.trusting is None or not runtime.trusting.trust.pays:
        return "experts are missed too often, or too few steps were seen"
    return "the model has hooks" if hooks.are_there() else None


def _why_not_in_pieces(runtime: ExpertRuntime, hooks: Hooks) -> str | None:
    """Say why no piece of an asking step may be replayed; None where all may."""
    if runtime.parallel is not None:
        return "experts are spread over processes"
    prediction = runtime.prediction
    return "the model has hooks" if hooks.are_there(prediction.owns_hook if prediction else None) else None
