"""Print a hash over the logits of ten families and of the demo model; equal before and after a change: same bits.

Every model runs in float32 and bfloat16, each under three budgets, prefill and then single tokens. The families are
the tests' small random models; their weights depend on a fixed seed alone. Hashes are comparable on one machine and one
version of torch only: another processor's arithmetic may differ in the last bit.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

from bench.device import add_device

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # for helpers.families, which no install brings

FAMILIES = (
    "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "nemotron_h",
    "phimoe",
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
FAMILY_BUDGETS = ("50%", "75%", "100%")
DEMO_BUDGETS = ("12.5%", "25%", "100%")
DEMO_PROMPT = "The history of the steam engine begins long before the railways. In the first century,"
NUM_DECODED = 12


def main(argv: list[str] | None = None) -> int:
    """Hash every case; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", help="folder of the demo model; without it the default one, built where absent")
    parser.add_argument("--no-demo", action="store_true", help="families only")
    parser.add_argument("--expect", type=Path, help="the JSON of an earlier run; exit 1 where a hash differs")
    add_device(parser)
    arguments = parser.parse_args(argv)

    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # the last bits of torch's own products depend on it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hashes = {}
    for name in FAMILIES:
        hashes.update(hash_family(name, arguments.device))
    if not arguments.no_demo:
        hashes.update(hash_demo(arguments.demo, arguments.device))
    whole = hashlib.sha256("".join(f"{case} {found}\n" for case, found in hashes.items()).encode()).hexdigest()[:16]
    print(f"\n{len(hashes)} cases, hash of all: {whole}")
    differing = []
    if arguments.expect:
        expected = json.loads(arguments.expect.read_text().splitlines()[-1])["hashes"]
        differing = [case for case in sorted(hashes.keys() | expected) if hashes.get(case) != expected.get(case)]
        print("same bits as expected" if not differing else f"different: {', '.join(differing)}")
    print(json.dumps({"hash": whole, "hashes": hashes, "differing": differing}))
    return 1 if differing else 0


def hash_family(name: str, device: str) -> dict[str, str]:
    """Hash one family's logits: of a batch, and of a single token."""
    import torch

    from helpers.families import FAMILIES as KNOWN
    from helpers.family_models import build_model, inputs

    family, hashes = KNOWN[name], {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            build_model(family, dtype=getattr(torch, dtype)).save_pretrained(folder)
            for budget in FAMILY_BUDGETS:
                with torch.no_grad(), load(folder, budget, dtype, device) as model:
                    batch = {key: value.to(device) for key, value in inputs(family).items()}
                    single = {key: value[:1, :1] for key, value in batch.items()}
                    logits = [model(**batch).logits, model(**single).logits]
                report(hashes, f"{name} {dtype} {budget}", logits)
    return hashes


def hash_demo(folder: str | None, device: str) -> dict[str, str]:
    """Hash the demo model's logits: of a prompt, and of every token of a greedy answer to it."""
    import torch
    from transformers import AutoTokenizer

    if folder is None:
        from moeflow.demo.model import default_demo_path as demo_path

        folder = str(demo_path())
    hashes = {}
    for dtype in DTYPES:
        for budget in DEMO_BUDGETS:
            with torch.no_grad(), load(folder, budget, dtype, device) as model:
                ids = AutoTokenizer.from_pretrained(folder)(DEMO_PROMPT, return_tensors="pt")["input_ids"].to(device)
                result = model(input_ids=ids, use_cache=True)
                logits = [result.logits]
                for _ in range(NUM_DECODED):
                    token = result.logits[:, -1:].argmax(-1)
                    result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True)
                    logits.append(result.logits)
            report(hashes, f"demo {dtype} {budget}", logits)
    return hashes


class load:
    """A model of load_moe that is closed at the end."""

    def __init__(self, folder: str, budget: str, dtype: str, device: str):
        from moeflow import load_moe

        self.model = load_moe(folder, expert_memory=budget, dtype=dtype, device=device, step="python")

    def __enter__(self):
        return self.model

    def __exit__(self, *exc_info):
        self.model.moeflow.close()


def report(hashes: dict[str, str], case: str, logits: list) -> None:
    """Add and print the hash of one case."""
    import torch

    digest = hashlib.sha256()
    for tensor in logits:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    hashes[case] = digest.hexdigest()[:16]
    print(f"{case:32} {hashes[case]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
