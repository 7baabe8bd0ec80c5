"""Solvers of placement by name, all with one signature (see `moeflow.placement.solvers.baselines`).

Know problems and bounds. Know nothing of files or of their comparison. `placement/solve.py` and `cli/` import them.
"""

from moeflow.placement.solvers.baselines import contiguous, greedy, random_placement
from moeflow.placement.solvers.eplb import eplb
from moeflow.placement.solvers.joint import joint
from moeflow.placement.solvers.moetuner import moetuner

SOLVERS = {
    "contiguous": contiguous,
    "random": random_placement,
    "greedy": greedy,
    "eplb": eplb,
    "moetuner": moetuner,
    "joint": joint,
}
