"""Puts a runtime behind a transformers model: in place of its experts, told of its passes; sets pruning.

Knows modules and their hooks. Knows nothing of budgets or tiers.
"""

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from moeflow.calibration.pruning_thresholds import calibrate_pruning
from moeflow.calibration.windows import cut_windows
from moeflow.errors import ConfigError
from moeflow.hf import experts_interface, pretrained
from moeflow.hf.loaded.absent_experts import first_name, refuse, run_experts_by
from moeflow.hf.loaded.mtp_layers import MtpLayers
from moeflow.hf.passes import forward
from moeflow.hf.passes.caches.step_cache import StepCache
from moeflow.hf.passes.capture_gate import capture_gate
from moeflow.hf.passes.decode_call import give_caches
from moeflow.loading.gpu_errors import run_on_gpu, tell_in_generate
from moeflow.moe import trusted_pass
from moeflow.moe.experts import OffloadedExperts
from moeflow.offload.runtime import ExpertRuntime
from moeflow.offload.trusting.capture import Capture

_PRUNING_TOKENS = 2048  # on which thresholds are found


def attach_runtime(model: PreTrainedModel, runtime: ExpertRuntime) -> None:
    """Put a runtime behind the model's experts modules, as `model.moeflow`; tell it and its observers of each pass.

    Args:
        model: its experts taken off.
        runtime: of its experts.
    """
    for layer, (path, module) in enumerate(experts_interface.experts_modules(model)):
        run_experts_by(path, module, OffloadedExperts(runtime, layer, module))
    changed: Any = model  # transformers' class has no such attributes
    changed.moeflow, changed.set_experts_implementation = runtime, _refuse_implementation
    for name in ("save_pretrained", "push_to_hub"):  # they begin to write before they look at any parameter
        setattr(model, name, partial(_save_adapter, weakref.ref(model), name))
    _pass_in_turn(model.base_model, runtime)
    if runtime.device.type != "cpu" and model.can_generate():
        tell_in_generate(model, runtime)


def attach_mtp(model: PreTrainedModel, layers: MtpLayers, runtime: ExpertRuntime, first: int) -> None:
    """Put the runtime behind a model's layers of multi-token prediction, for the drafts of its engines.

    Args:
        model: with its runtime.
        layers: loaded, their experts taken off.
        runtime: of the model.
        first: their number among the runtime's layers.
    """
    for layer, (path, module) in enumerate(layers.experts(), first):
        run_experts_by(path, module, OffloadedExperts(runtime, layer, module))
    vars(model)["_moeflow_mtp"] = layers


def _pass_in_turn(module: torch.nn.Module, runtime: ExpertRuntime) -> None:
    """Let one thread at a time pass through a module, and tell the runtime as each pass begins.

    Predictor, observers, rotary embedding and counters know one pass at a time. In place of `forward`, since a hook
    cannot release what another took after every interrupt.
    """
    own, behind, runtime_behind = vars(module).get("forward"), weakref.ref(module), weakref.ref(runtime)
    hooks = trusted_pass.Hooks(module)

    @torch.compiler.disable
    def begin_pass(args: tuple, kwargs: dict[str, Any]) -> forward.ForwardPass | None:
        begun, runtime = forward.describe_pass(args, kwargs), runtime_behind()
        if begun is not None and runtime is not None:
            runtime.begin_pass(begun)
        return begun

    def run_pass(*args: Any, **kwargs: Any) -> Any:
        runtime = runtime_behind()
        if runtime is None or runtime.device.type == "cpu":
            return run_told(*args, **kwargs)
        return run_on_gpu(runtime, partial(run_told, *args, **kwargs))

    def run_told(*args: Any, **kwargs: Any) -> Any:
        begun, runtime = begin_pass(args, kwargs), runtime_behind()
        module: Any = behind()
        run: Any = partial(type(module).forward, module) if own is None else own
        if begun is None or runtime is None:
            return run(*args, **kwargs)
        return trusted_pass.run_pass(runtime, hooks, begun, run, args, kwargs)

    def in_turn(*args: Any, **kwargs: Any) -> Any:
        runtime = runtime_behind()
        if runtime is None:
            return run_pass(*args, **kwargs)
        return runtime.turns.run(capture_gate.run, run_pass, *args, **kwargs)

    in_turn_untraced = torch.compiler.disable(in_turn, recursive=False)  # which refuses while another thread captures

    def forward_in_turn(*args: Any, **kwargs: Any) -> Any:
        run = in_turn_untraced if torch.compiler.is_dynamo_compiling() else in_turn
        return run(*args, **kwargs)

    changed: Any = forward_in_turn
    changed.__signature__ = inspect.signature(module.forward)
    module.forward = forward_in_turn


def capture_steps(model: PreTrainedModel, runtime: ExpertRuntime, capture: Capture) -> None:
    """Let decode steps of `generate` be captured, in pieces where experts are missed.

    Args:
        model: with its runtime.
        runtime: on a GPU.
        capture: of that GPU.
    """
    behind = weakref.ref(model)

    def in_place_of(cache: object, settings: Any, mode: Any) -> Any:
        model = behind()
        return None if model is None else StepCache.in_place_of(cache, model, settings, mode)

    assert runtime.trusting is not None, "on a CPU no step is captured"
    runtime.trusting.capture(capture)
    give_caches(model, in_place_of)


def prune_experts(model: PreTrainedModel, runtime: ExpertRuntime, folder: Path, share: float) -> None:
    """Find every layer's pruning threshold on text that any machine has, and set it.

    Args:
        model: with its runtime attached.
        runtime: of the model; its counts begin anew.
        folder: of the model, for its tokenizer.
        share: of the experts behind each token's first that are left out.
    """
    windows = cut_windows(pretrained.load_tokenizer(folder), None, _PRUNING_TOKENS)
    thresholds = calibrate_pruning(model, windows, skipped_share=share)
    runtime.reset_stats()
    for (_, module), threshold in zip(experts_interface.experts_modules(model), thresholds, strict=True):
        module._moeflow.use(before=[threshold.apply])


def _refuse_implementation(*args: Any, **kwargs: Any) -> NoReturn:
    raise ConfigError(
        "this model's experts are not in its modules, so no other implementation can run them. Load the model with "
        "AutoModelForCausalLM.from_pretrained to choose one."
    )


def _save_adapter(behind: Callable[[], Any], method: str, *args: Any, **kwargs: Any) -> Any:
    """Save the adapter of a model that has one, as transformers does; the model itself cannot be saved."""
    model = behind()
    if not getattr(model, "_hf_peft_config_loaded", False):
        refuse(first_name(experts_interface.experts_modules(model)[0][1]))
    return getattr(type(model), method)(model, *args, **kwargs)
