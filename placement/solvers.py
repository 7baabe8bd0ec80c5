"""The solvers by name. All have one signature, see `moeflow.placement.baselines`."""

from moeflow.placement.baselines import contiguous, greedy, random_placement
from moeflow.placement.eplb import eplb
from moeflow.placement.joint import joint
from moeflow.placement.moetuner import moetuner

SOLVERS = {
    "contiguous": contiguous,
    "random": random_placement,
    "greedy": greedy,
    "eplb": eplb,
    "moetuner": moetuner,
    "joint": joint,
}
