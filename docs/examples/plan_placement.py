"""Plan which of two GPUs holds which expert, from the counts of a recorded trace.

python docs/examples/plan_placement.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from moeflow import load_moe
from moeflow.demo.model import build_demo_model
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.problem import Problem
from moeflow.placement.solvers import SOLVERS
from moeflow.placement.topology import preset
from moeflow.trace.workloads import read_workload

folder = sys.argv[1] if len(sys.argv) > 1 else str(build_demo_model())
with tempfile.TemporaryDirectory() as work:
    path = Path(work) / "routes.trace"
    model = load_moe(folder, expert_memory="40%", trace=path)
    with model.moeflow:
        inputs = AutoTokenizer.from_pretrained(folder)("The capital of France is", return_tensors="pt")
        model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=0)
    counts = read_workload(path)
problem = Problem((counts,), preset("nvlink", 2).without_memory_limits(), StepShape(), num_replicas=0)
for name in ("contiguous", "joint"):
    solution = SOLVERS[name](problem, seed=0, time_limit_s=5)
    print(f"{name}: imbalance {judge(solution.plan, counts, problem.topology, problem.step).imbalance:.3f}")
