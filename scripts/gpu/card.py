"""The machine as it is: the card, its driver and link, limits, compilers, versions."""

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from gpu.worker import Tell, UnavailableError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy", "pytest", "hypothesis")


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Return the card of the report.

    Raises:
        UnavailableError: there is no GPU, and this is no dry run.
    """
    if job["device"] != "cpu" and not torch.cuda.is_available():
        raise UnavailableError(
            "torch sees no CUDA GPU here. Give --dry-run to try the report itself, or look at the driver (nvidia-smi) "
            f"and at torch's build ({torch.__version__}, CUDA {torch.version.cuda})."
        )
    git = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "gpu": None if job["device"] == "cpu" else describe_gpu(torch.device(job["device"])),
        "machine": describe(*PACKAGES),
        "system": platform.platform(),
        "wsl": "microsoft" in platform.release().lower(),
        "commit": git.stdout.strip() or None,
        "cuda": torch.version.cuda,
        "locked_memory_limit": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "tools": {name: find_tool(name) for name in ("cc", "gcc", "nvcc", "compute-sanitizer", "nvidia-smi")},
        "python_headers": _has_headers(),
        "pytest": importlib.util.find_spec("pytest") is not None,
        "work_free_bytes": shutil.disk_usage(job["work"]).free,
    }


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Return name, memory and limits of a card, and what NVML says of its driver and link."""
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "shared_memory_bytes": getattr(properties, "shared_memory_per_block_optin", None),
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        **_nvml(str(getattr(properties, "uuid", ""))),
    }


def _nvml(uuid: str) -> dict[str, Any]:
    """Return what NVML knows of a card; the link as it is now, which may be slower at rest, and at its best."""
    import pynvml

    asked = {
        "driver": lambda handle: pynvml.nvmlSystemGetDriverVersion(),
        "link_generation": pynvml.nvmlDeviceGetCurrPcieLinkGeneration,
        "link_width": pynvml.nvmlDeviceGetCurrPcieLinkWidth,
        "link_generation_best": pynvml.nvmlDeviceGetMaxPcieLinkGeneration,
        "link_width_best": pynvml.nvmlDeviceGetMaxPcieLinkWidth,
        "power_limit_w": lambda handle: pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        "memory_clock_mhz": lambda handle: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "temperature_c": lambda handle: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }
    found: dict[str, Any] = {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        return {"nvml": str(error)}
    for name, ask in asked.items():
        try:
            found[name] = ask(handle)
        except pynvml.NVMLError as error:
            found[name] = str(error)
    pynvml.nvmlShutdown()
    return found


def find_tool(name: str) -> str | None:
    """Return where a command lies, CUDA's usual folder included; None where it is not installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin:{home}/compute-sanitizer")


def _has_headers() -> bool:
    """Whether Triton can compile its launchers against this Python."""
    import sysconfig

    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()
