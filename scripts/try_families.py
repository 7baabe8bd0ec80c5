"""Decode every tiny family by its step program and by its own code, and write docs/families.md.

    python scripts/try_families.py                     # all families, printed
    python scripts/try_families.py qwen3_next jamba    # some
    python scripts/try_families.py --write             # all, and the page

The families are the tests' small random models, in float32. Each decodes 24 greedy tokens, both ways.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for helpers.families, which no install brings

_MOST = 1e-5
_BEGINNING = """\
# Families of models and their decode steps

Which of the families of mixture-of-experts models in transformers decode natively under `load_moe(step="auto")`
([step.md](step.md)), tried with a tiny random model of each, in float32, over 24 greedy tokens.
`python scripts/try_families.py --write` writes this page; `tests/step/test_families.py` holds a part of it.

**{native} of {all} decode natively**; their logits differ from the model's own by at most {difference:.0e} of the
largest.
"Attention by its own code" means that attention is the model's Python, and all around it the program.
"`torch` instructions" are operations that torch runs, between native stretches.

| family | decodes | remarks |
|---|---|---|
"""


def main(argv: list[str] | None = None) -> int:
    """Try families; exit with 1 where one differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="their names; all where none is given")
    parser.add_argument("--write", action="store_true", help="write docs/families.md; with all families only")
    arguments = parser.parse_args(argv)

    import torch
    from transformers.utils import logging

    from helpers.families import FAMILIES
    from helpers.step_runs import PAGE, FamilyRun, remark, run_family

    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    for name in arguments.families or sorted(FAMILIES):
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = runs[name] = run_family(name, Path(folder))
            except Exception as error:  # of one family; the others are tried as well
                run = runs[name] = FamilyRun("python", f"{type(error).__name__}: {error!s:.150}", 0, {}, 0.0, False)
        print(f"{name:22} {run.mode} {run.difference:.1e} {remark(run)}", flush=True)
    native = [run for run in runs.values() if run.mode == "native"]
    wrong = [name for name, run in runs.items() if run.difference > _MOST or not run.same_tokens]
    print(f"{len(native)} of {len(runs)} native; wrong: {', '.join(wrong) or 'none'}")
    if arguments.write and not arguments.families:
        most = max(run.difference for run in native)
        rows = [f"| `{name}` | {run.mode} | {remark(run)} |\n" for name, run in runs.items()]
        text = _BEGINNING.format(native=len(native), all=len(runs), difference=most) + "".join(rows)
        PAGE.write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
