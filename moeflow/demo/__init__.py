"""The demo model: its source, its conversion, its checkpoint.

Knows calibration's texts and checkpoints. Knows nothing of the runtime. Only `cli/` and scripts import it.
"""
