"""Weight formats and how a matrix is brought into one: rounding, HQQ, GPTQ, packing, and back.

Know matrices. Know nothing of experts, files or models. `checkpoint/`, `calibration/`, `convert/` and kernels import
them.
"""
