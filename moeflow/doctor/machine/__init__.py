"""Checks of the machine: software, processor, memory, disks, GPUs, environment.

Know the system. Know nothing of models. Only `doctor/` imports them.
"""
