"""One rank whose experts run by Triton's kernels, under the interpreter: are its bits those of a whole call?

    RANK=0 WORLD_SIZE=2 TRITON_INTERPRET=1 python tests/helpers/parallel_triton.py FOLDER OUT

The ranks' calls have so few tokens, and so many, that they take different paths; the rows that meet on a rank would
take a third.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from helpers.split_experts import compute, larger_blocks
from moeflow import load_moe
from moeflow.expert_parallel import expert_parallel
from moeflow.hf import experts_interface

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
NUM_TOKENS = (10, 20)  # paired, and tiles


@torch.no_grad()
def main(folder, out):
    torch.set_num_threads(1)
    larger_blocks()
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=RANK, world_size=WORLD_SIZE, timeout=timedelta(seconds=180)
    )
    dtype, generator = torch.bfloat16, torch.Generator().manual_seed(RANK)
    with (model := load_moe(folder, device="cpu", dtype=dtype, predictor=None, expert_memory="50%")).moeflow:
        module = experts_interface.experts_modules(model)[-1][1]
        served, num_tokens = module._moeflow, NUM_TOKENS[RANK]
        served._computes[dtype] = compute("triton", module, model.moeflow.records(served.layer), dtype)
        hidden_states = torch.randn(num_tokens, 64, generator=generator).to(dtype)
        top_k_index = torch.rand(num_tokens, 8, generator=generator).topk(2).indices
        weights = torch.rand(num_tokens, 2, generator=generator).to(dtype)
        whole = module(hidden_states, top_k_index, weights)
        with expert_parallel.apply(model).session():
            spread = module(hidden_states, top_k_index, weights)
        torch.save({"whole": whole, "spread": spread}, out / f"rank{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # as `moeflow parallel` ends
