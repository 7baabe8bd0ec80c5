"""The demo model: what it is made from, how it is made, where it lies.

Knows calibration's texts and checkpoints. Knows nothing of the runtime. Only `cli/` and scripts import it.
"""
