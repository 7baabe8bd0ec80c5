"""Compare the files that moeflow gguf writes with llama.cpp: a small random model of every family, and its logits.

For each form of a family: the model is written in float32, read back by moeflow's rules (every parameter bit for bit,
and the logits of a model built from the file's metadata), and run by llama-cpp-python. The last column is the largest
difference of its logits from transformers' own, over the largest logit.

    python scripts/check_gguf_families.py --llama-python VENV/bin/python [--only NAME ...]
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for helpers.gguf_families, which no install brings
TOKENS = 16
CLOSE = 1e-4
# Run by the Python that has llama-cpp-python: the file and token ids in, logits [tokens, rows] out.
LLAMA = """
import json, sys
import numpy as np
from llama_cpp import Llama
file, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = Llama(file, n_ctx=64, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False)
model.eval(ids)
np.save(out, np.array(model.scores[: len(ids)]))
"""
# What llama.cpp itself computes otherwise than the model; transformers is changed here to compute it so too.
DEPARTURES = {
    "phimoe": "softmax over all experts, RMS norms",
    "gpt-oss-yarn": "yarn's range in whole dimensions",
}


def main() -> None:
    """Print the table; the exit code is 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python; without it nothing is compared")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="forms of families (all)")
    arguments = parser.parse_args()
    from transformers.utils import logging

    from helpers.gguf_families import gguf_families
    from helpers.hybrid_gguf import MODELS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wrong = 0
    print(f"{'family':22} {'architecture':14} {'tensors':>8} {'read back':>10} {'own logits':>11} {'llama.cpp':>11}")
    for name in arguments.only or [*gguf_families(), *MODELS]:
        with tempfile.TemporaryDirectory() as folder:
            row = check(name, Path(folder), arguments.llama_python)
        good = row["same"] and row["own"] < CLOSE and (row["llama"] is None or row["llama"] < CLOSE)
        wrong += not good
        llama = row["why"] or ("not run" if row["llama"] is None else f"{row['llama']:.1e}")
        note = next((text for key, text in DEPARTURES.items() if name.startswith(key)), "")
        print(
            f"{name:22} {row['architecture']:14} {row['tensors']:8} {'equal' if row['same'] else 'DIFFER':>10} "
            f"{row['own']:11.1e} {llama:>11}{'' if good else '  <-- differs'}{note and f'  ({note})'}",
            flush=True,
        )
    sys.exit(wrong > 0)


def saved(name: str, folder: Path):
    """Save a small model with a tokenizer, and return it."""
    from helpers.gguf_families import byte_tokenizer, gguf_families, save_family
    from helpers.hybrid_gguf import MODELS, tiny_model

    if name not in MODELS:
        return save_family(gguf_families()[name], folder)
    model = tiny_model(name)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def check(name: str, folder: Path, llama_python: str | None) -> dict:
    """Write a model, read it back and compare logits."""
    import numpy as np
    import torch

    from helpers.gguf_families import load_back
    from moeflow.convert.gguf import write_gguf
    from moeflow.hf.gguf.architectures import find_architecture

    model = saved(name, folder / "model")
    file = folder / "model.gguf"
    written = write_gguf(folder / "model", file, "f32")
    loaded, _ = load_back(file, find_architecture(written.architecture))
    state = loaded.state_dict()
    ids = torch.randint(3, 259, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, own = (one(ids, use_cache=False).logits[0] for one in (model, loaded))
        row = {
            "architecture": written.architecture,
            "tensors": written.num_tensors,
            "same": all(_same(key, value, state[key]) for key, value in model.state_dict().items()),
            "own": _difference(own, expected),
            "llama": None,
            "why": "",
        }
        if llama_python is None:
            return row
        if name.startswith("phimoe"):
            _as_llama_cpp_has_phi(model)
        if name == "gpt-oss-yarn":
            config = copy.deepcopy(model.config)
            config.rope_parameters["truncate"] = True
            model.model.rotary_emb = type(model.model.rotary_emb)(config)
        expected = model(ids, use_cache=False).logits[0]
    command = [llama_python, "-c", LLAMA, str(file), json.dumps(ids[0].tolist()), str(folder / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["ended without a word"]
        print("\n".join(lines[-3:]), file=sys.stderr)
        return row | {"why": "FAILED", "llama": float("inf")}
    return row | {"llama": _difference(torch.from_numpy(np.load(folder / "logits.npy")), expected)}


def _same(name, value, found) -> bool:
    if name.endswith("A_log"):  # the logarithm of an exponential
        return bool(((value - found).abs() <= 1e-6 * value.abs() + 1e-6).all())
    return bool((value == found).all())


def _difference(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _as_llama_cpp_has_phi(model) -> None:
    """Let Phi's router weigh its experts by a softmax over all, and its norms leave the mean where it is."""
    import torch

    def routed(router, hidden):
        scores = torch.nn.functional.linear(hidden, router.weight)
        weights, chosen = scores.softmax(-1).topk(router.top_k)
        return scores, weights / weights.sum(-1, keepdim=True), chosen

    def normed(norm, values):
        return values * (values.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight + norm.bias

    for module in model.modules():
        if type(module).__name__ == "PhimoeTopKRouter":
            module.forward = routed.__get__(module)
        elif isinstance(module, torch.nn.LayerNorm):
            module.forward = normed.__get__(module)


if __name__ == "__main__":
    main()
