"""What a machine can do: a profile of measured speeds, its file in the cache folder, and its measuring.

Knows the processor, memory, disks and kernels. Knows nothing of models. `fit/`, `loading/`, `doctor/` and
`cli/` import it.
"""
