"""A model whose card fails on the way, in a process of its own: the context of a card does not live through it.

Arguments: the job as JSON; the card fails where "breaks" is true. Prints what the calls afterwards raised. Exit code 1
where one raised something else than an error of moeflow's in one line, or where closing did.
"""

import json
import sys

from gpu.models import draw_prompt, folder_of


def main() -> int:
    import torch

    from moeflow import load_moe
    from moeflow.errors import MoeflowError

    job = json.loads(sys.argv[1])
    model = load_moe(folder_of(job, "bfloat16"), device=job["device"], expert_memory="25%", predictor=None)
    prompt = draw_prompt(model, 16)
    model(prompt)
    breaks = job.get("breaks", False)
    if breaks:
        beyond = torch.tensor([5], device=job["device"])
        torch.zeros(2, device=job["device"])[beyond]  # an assertion on the device, told by a later call
    told = []
    for call in (model, model, lambda ids: model.generate(ids, max_new_tokens=2)):
        try:
            call(prompt)
        except MoeflowError as error:
            told.append(f"{type(error).__name__}: {error}")
        except Exception as error:
            told.append(f"not moeflow's: {type(error).__name__}: {error}")
    model.moeflow.close()
    print(json.dumps(told), flush=True)
    is_wrong = len(told) != (3 if breaks else 0) or any("\n" in one or one.startswith("not") for one in told)
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
