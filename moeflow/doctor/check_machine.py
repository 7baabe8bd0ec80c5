"""Every check of the machine, and of the disk of a model.

Knows the checks. Knows nothing of how they look.
"""

import os
from pathlib import Path

from moeflow.doctor.finding import Finding
from moeflow.doctor.machine.disks import check_cache_folder, check_model_disk
from moeflow.doctor.machine.environment import check_clock, check_environment
from moeflow.doctor.machine.gpus import check_gpus
from moeflow.doctor.machine.memory import check_memory
from moeflow.doctor.machine.software import check_software
from moeflow.machine.gpus import machine_gpus


def check_machine(model: Path | None = None) -> list[Finding]:
    """Look at this machine.

    Args:
        model: folder of a model, whose disk is looked at too.

    Returns:
        What was found, in the order of the checks.
    """
    return [
        *check_software(),
        *check_memory(has_gpu=bool(machine_gpus())),
        *check_cache_folder(),
        *(check_model_disk(model) if model is not None else ()),
        *check_gpus(),
        *check_environment(os.environ),
        *check_clock(),
    ]
