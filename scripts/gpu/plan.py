"""The steps of the report on a card: what each does, how long it may take, and in which order they run.

Knows names and numbers. Imports neither torch nor moeflow.
"""

from typing import Any, NamedTuple

from make_random_moe import Shape

FORMATS = ("bfloat16", "int4")
SHARES = ("100%", "45%", "25%", "12%")
TINY = Shape(2, 16, 2, 64, 32, 4, 2, 16, 128, 16384)  # of a dry run


class Step(NamedTuple):
    """One step, run in a process of its own for each of its cases.

    Args:
        name: as `--only` takes it.
        about: what it finds out.
        least_s: seconds without which it is not begun.
        most_s: seconds after which a case is ended.
        cases: what differs between its runs.
        dry: the cases of a dry run.
        models: whether it runs the random models.
    """

    name: str
    about: str
    least_s: float
    most_s: float
    cases: tuple[dict[str, Any], ...] = ({},)
    dry: tuple[dict[str, Any], ...] = ({},)
    models: bool = False


def _end_to_end(miss: str) -> tuple[dict[str, Any], ...]:
    both: list[str | None] = [None, "auto"]
    return tuple(
        {"format": name, "share": share, "miss": miss, "predictors": both if share != "100%" else [None]}
        for name in FORMATS
        for share in (SHARES if miss == "copy" else SHARES[1:])
    )


def _end_to_end_graphs() -> tuple[dict[str, Any], ...]:
    return tuple(
        {"format": name, "share": share, "miss": "copy", "predictors": predictors, "cuda_graphs": True}
        for name in FORMATS
        for share, predictors in ((SHARES[0], [None]), (SHARES[1], [None]), (SHARES[2], [None, "auto"]))
    )


# What is worth most comes first: a run that is cut has it.
STEPS = (
    Step("card", "the card, its driver and link, the machine, the software", 0, 60),
    Step("bandwidth", "bytes a second of the link, by host memory and direction, and of the card's memory", 10, 90),
    Step("claims", "tests/helpers/triton_claims.py: what the kernels must do", 20, 240, dry=({"tests": "fp8_has"},)),
    Step("cuda_tests", "pytest -m gpu", 20, 150, dry=({"tests": "timed"},)),
    Step("models", "random models of Qwen3-30B-A3B's shape, 12 layers: bfloat16, and int4 of it", 30, 300),
    Step(
        "end_to_end",
        "tok/s, time to the first token, link, launches, synchronisations at each residency",
        40,
        150,
        _end_to_end("copy"),
        ({"format": "bfloat16", "share": "45%", "miss": "copy", "predictors": [None, "auto"]},),
        models=True,
    ),
    Step(
        "bits",
        "digests of logits, which must be equal at every residency",
        30,
        150,
        tuple({"format": name, "shares": SHARES} for name in FORMATS),
        ({"format": "int4", "shares": SHARES[:3]},),
        models=True,
    ),
    Step(
        "small_card",
        "a card of 12 GB, imitated by a ballast: a prompt of 8,192 tokens, and 32 requests at once",
        40,
        180,
        models=True,
    ),
    Step("signals", "SIGINT at 150 random times in generate(), and an answer right after each", 30, 240, models=True),
    Step("kernels", "scripts/bench_triton.py: bandwidth of each format", 30, 300, dry=({"formats": ["int4-g64"]},)),
    Step(
        "races",
        "TORCH_CUDA_SANITIZER=1 over the CUDA tests and the claims",
        30,
        180,
        ({"over": "cuda_tests"}, {"over": "claims"}),
        (),
    ),
    Step(
        "compute_sanitizer",
        "compute-sanitizer over the kernels, where it is installed",
        30,
        180,
        ({"tool": "memcheck"}, {"tool": "racecheck"}),
        ({"tool": "memcheck"},),
    ),
    Step("end_to_end", "the same by miss=cheapest, lossy", 40, 150, _end_to_end("cheapest"), (), models=True),
    Step("end_to_end", "the same with decode steps as CUDA graphs", 40, 150, _end_to_end_graphs(), (), models=True),
    Step("bad_input", "what must end in an error of one line, and leave the rest usable", 30, 150, models=True),
)
NAMES = tuple(dict.fromkeys(step.name for step in STEPS))


def select(only: list[str] | None) -> list[Step]:
    """Return the steps of these names in their order, with those that they need: the card, and the models.

    Raises:
        ValueError: names a step that is none.
    """
    wanted = set(NAMES if only is None else only)
    if unknown := sorted(wanted - set(NAMES)):
        raise ValueError(f"{', '.join(unknown)}: known steps are {', '.join(NAMES)}")
    needed = {"card"} | ({"models"} if any(step.models for step in STEPS if step.name in wanted) else set())
    return [step for step in STEPS if step.name in wanted | needed]
