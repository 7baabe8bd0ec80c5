"""Compare native steps with transformers in float32: the greedy tokens of a long answer, and each step's logits.

Both decode from the same prompt. Logits are compared while the tokens are the same; their difference is given as a part
of the largest logit of the step. Exit 1 where a token differs, or a logit by more than 1e-5.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.device import add_device

PROMPT = "The history of the steam engine begins long before the railways. In the first century,"
MOST_DIFFERENCE = 1e-5


def main(argv: list[str] | None = None) -> int:
    """Compare; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; without it the demo model")
    parser.add_argument("--tokens", type=int, default=256, help="of the answer (256)")
    parser.add_argument("--budget", default="100%", help="experts in memory (100%%)")
    add_device(parser)
    arguments = parser.parse_args(argv)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from moeflow import load_moe
    from moeflow.demo.model import default_demo_path

    logging.disable_progress_bar()
    folder = Path(arguments.model) if arguments.model else default_demo_path()
    device = arguments.device
    prompt = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").to(device)

    def answer(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [n] of an answer, and its steps' logits [n, V]."""
        out = model.generate(
            **prompt, max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return out.sequences[0, prompt.input_ids.shape[1] :], torch.cat(out.logits)

    with (model := load_moe(folder, dtype="float32", device=device, expert_memory=arguments.budget)).moeflow as runtime:
        tokens, logits = answer(model)
        step = runtime.stats()["step"]
    del model
    expected, reference = answer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device))
    same = int((tokens == expected).int().cumprod(0).sum())
    compared = slice(0, min(same + 1, len(tokens)))
    difference = (logits[compared] - reference[compared]).abs().amax(1) / reference[compared].abs().amax(1)
    worst = float(difference.max())
    print(f"{folder.name}, float32, {device}, {step['steps']} native steps ({step['mode']})")
    print(f"the first {same} of {len(tokens)} greedy tokens are those of transformers eager")
    print(f"largest difference of a logit: {worst:.1e} of the step's largest (allowed: {MOST_DIFFERENCE:.0e})")
    print(json.dumps({"same_tokens": same, "tokens": len(tokens), "largest_difference": worst, "step": step}))
    return 0 if same == len(tokens) and worst <= MOST_DIFFERENCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
