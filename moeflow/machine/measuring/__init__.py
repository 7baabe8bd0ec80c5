"""How each figure of a profile is measured: memory, disk, experts, dense matrices, copies to a GPU, layers.

Knows kernels, files and clocks. Knows nothing of models or of the profile's file. `machine/` and `doctor/` import it.
"""
