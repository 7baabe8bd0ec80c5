"""What a GPU's driver and torch's allocator raise in a pass, told as one line that says what is still usable.

Knows exceptions. Knows nothing of passes. Not yet seen on a GPU.
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from moeflow.errors import GpuError
from moeflow.offload.runtime import ExpertRuntime

Result = TypeVar("Result")
_DRIVER = ("CUDA error", "Triton Error [CUDA]", "CUDA driver error")  # how messages of its errors begin


def run_on_gpu(runtime: ExpertRuntime, run: Callable[[], Result]) -> Result:
    """Run a part of a pass on a GPU.

    After an error that stays, such as an illegal access or a lost card, the runtime refuses every later call.

    Args:
        runtime: of the model.
        run: the part.

    Raises:
        GpuError: the GPU ran out of memory, or its driver reported an error, perhaps one of an earlier call.
    """
    try:
        return run()
    except torch.OutOfMemoryError as error:
        told = _out_of_memory(runtime, _first_line(error))
    except RuntimeError as error:
        line = _first_line(error)
        if not line.startswith(_DRIVER):
            raise
        told = _failed(runtime, line)
    raise told  # behind the handlers, so that nothing holds the tensors of the pass


def tell_in_generate(model: PreTrainedModel, runtime: ExpertRuntime) -> None:
    """Let `model.generate` tell errors of the GPU so too: of what runs outside of the layers, and of earlier calls."""
    kind: Any = type(model)
    own, behind = kind.generate, weakref.ref(model)

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        return run_on_gpu(runtime, functools.partial(own, behind(), *args, **kwargs))

    changed: Any = generate
    changed.__signature__ = inspect.signature(own.__get__(model))
    model.__dict__["generate"] = changed


def _out_of_memory(runtime: ExpertRuntime, line: str) -> GpuError:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return GpuError(
        f"{runtime.device} has too little free memory for this pass ({line}). The model stays usable: run fewer tokens "
        "at once, free memory on the GPU, or load with a smaller expert_memory or a larger kv_memory."
    )


def _failed(runtime: ExpertRuntime, line: str) -> GpuError:
    if not _stays(runtime.device):
        return GpuError(f"a pass on {runtime.device} failed ({line}). The model stays usable: call again.")
    error = GpuError(
        f"{runtime.device} is of no use to this process any more ({line}), and the cause may lie in an earlier call. "
        "Start a new process and load the model there; CUDA_LAUNCH_BLOCKING=1 shows the call that failed."
    )
    runtime.refuse(error)
    return error


def _stays(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
