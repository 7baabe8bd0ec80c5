"""Checks of NVIDIA GPUs: driver, memory, link, and whether torch and Triton can use them.

Knows NVML and torch. Knows nothing of models.
"""

from collections.abc import Iterator
from typing import Any

from moeflow.doctor.finding import BROKEN, HARMFUL, Finding
from moeflow.formatting import format_bytes
from moeflow.machine.gpus import gpu_names, visible_devices

_ABSENT = "none"


def check_gpus() -> Iterator[Finding]:
    """Look at the GPUs of this machine."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        yield Finding("GPU", f"{_ABSENT} with an NVIDIA driver; models run on the processor")
        return
    except pynvml.NVMLError as error:
        yield Finding("GPU", f"the driver does not answer: {error}", BROKEN, "no GPU can be used",
                      "restart the machine, or install the driver again")  # fmt: skip
        return
    try:
        count = pynvml.nvmlDeviceGetCount()
        yield Finding("driver", f"{_text(pynvml.nvmlSystemGetDriverVersion())}, {count} GPUs")
        for number in range(count):
            yield from _gpu(pynvml, number)
    finally:
        pynvml.nvmlShutdown()
    if count:
        yield from _torch_on_gpu()


def _gpu(nvml: Any, number: int) -> Iterator[Finding]:
    handle, name = nvml.nvmlDeviceGetHandleByIndex(number), f"GPU {number}"
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    found = f"{_text(nvml.nvmlDeviceGetName(handle))}, {format_bytes(memory.free)} free of {format_bytes(memory.total)}"
    if 2 * memory.free < memory.total:
        yield Finding(name, found, HARMFUL, "other programs take most of its memory", "end them: nvidia-smi names them")
    else:
        yield Finding(name, found)
    try:
        width, most = nvml.nvmlDeviceGetCurrPcieLinkWidth(handle), nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
        generation = nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle)
        found = f"PCIe {generation} x{width} of {nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)} x{most}"
    except nvml.NVMLError:
        return  # no PCIe, or a virtual GPU that does not tell
    if width < most:
        yield Finding(f"{name}'s link", found, HARMFUL, f"copies take {most / width:g} times as long as they could",
                      "put the card into a slot with all lanes")  # fmt: skip
    else:
        yield Finding(f"{name}'s link", f"{found} (the generation is lower while the GPU idles)")


def _torch_on_gpu() -> Iterator[Finding]:
    import torch

    if not gpu_names():
        yield Finding("CUDA", f"CUDA_VISIBLE_DEVICES={visible_devices()!r}", HARMFUL, "it hides every GPU",
                      "unset it, or name a GPU")  # fmt: skip
    elif torch.version.cuda is None:
        yield Finding("CUDA", f"torch {torch.__version__} is a build without CUDA", BROKEN,
                      "models run on the processor beside an idle GPU",
                      "install a CUDA build of torch: https://pytorch.org/get-started")  # fmt: skip
    elif not torch.cuda.is_available():
        yield Finding("CUDA", f"torch {torch.__version__} for CUDA {torch.version.cuda}", BROKEN,
                      "torch cannot start it: the driver may be older than this CUDA",
                      "update the driver, or install torch for an older CUDA")  # fmt: skip
    else:
        from moeflow.kernels.triton.probe import why_not

        reason = why_not(torch.device("cuda", 0))
        if reason is None:
            yield Finding("CUDA", f"torch {torch.__version__} for CUDA {torch.version.cuda}; Triton's kernels run")
        else:
            yield Finding("CUDA", f"Triton's kernels do not run: {reason}", HARMFUL, "PyTorch's own are slower",
                          'pip install "triton>=3.6", with a C compiler beside it')  # fmt: skip


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
