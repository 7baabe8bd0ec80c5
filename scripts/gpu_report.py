"""All that the first hour on a card is for, in one command: what holds on it, and how fast it is.

    python scripts/gpu_report.py [--out gpu_report.json] [--minutes 25] [--only STEPS] [--routes TRACE]
    python scripts/gpu_report.py --dry-run        # every step, tiny, on the CPU: under a minute

Runs offline with torch, triton and transformers; pytest and hypothesis add the tests. Each step is a process of its own
that ends in time, and after each of its rows the JSON file is replaced, so that a run that is cut, by Ctrl-C too, keeps
what it has. A table in markdown lies beside it at the end. The random models stay in --work for the next run.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, wherever it is called from

from gpu.plan import STEPS, Step, select
from gpu.report_file import FAILED, INTERRUPTED, OK, SKIPPED, TIMED_OUT, UNAVAILABLE, Report
from gpu.runner import one_card, run_step, worker_command
from gpu.table import markdown
from moeflow.atomic_file import check_target, write_atomically
from moeflow.errors import MoeflowError
from moeflow.paths import cache_folder

ROOT = Path(__file__).resolve().parent.parent
_OPTIONS = ("minutes", "only", "device", "routes", "work", "dry_run")  # that the report names


def main(argv: list[str] | None = None) -> int:
    """Run the steps. Returns 0 where all is well, 1 where a step failed, 2 without a GPU, 130 after Ctrl-C."""
    arguments = parse_args(argv)
    if arguments.worker:
        import json

        from gpu.worker import work

        return work(arguments.worker, json.loads(arguments.job))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the step, and what is there stays
    try:
        check_target(arguments.out)
        arguments.work.mkdir(parents=True, exist_ok=True)
        report = Report(arguments.out, {name: _plain(getattr(arguments, name)) for name in _OPTIONS})
        code = run(report, arguments)
        write_atomically(arguments.out.with_suffix(".md"), markdown(report.content))
    except (MoeflowError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(markdown(report.content))
    print(f"{arguments.out} and {arguments.out.with_suffix('.md')} written", file=sys.stderr)
    return code


def run(report: Report, arguments: argparse.Namespace) -> int:
    """Run every step that time is left for; return the exit code."""
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        for step in select(arguments.only):
            for case in step.dry if arguments.dry_run else step.cases:
                run_case(report, step, case, deadline, arguments)
            if step.name == "card" and report.count(OK) == 0:
                say(report.content["steps"][0]["error"])
                return 2
    except KeyboardInterrupt:
        say("stopped; what is there stays")
        return 130
    report.finish()
    return 1 if report.count(FAILED, TIMED_OUT) else 0


def run_case(report: Report, step: Step, case: dict, deadline: float, arguments: argparse.Namespace) -> None:
    """Run one case of a step, or say why it is not run.

    Raises:
        KeyboardInterrupt: as it came; the entry says so.
    """
    left = deadline - time.monotonic()
    least_s = 1.0 if arguments.dry_run else step.least_s
    if step.name != "card" and left < least_s:
        report.begin(step.name, case, SKIPPED, f"{left:.0f} s were left, and it takes {least_s:.0f} s or more")
        say(f"{step.name}: skipped, {left:.0f} s left")
        return
    environment = one_card(arguments.device, dict(os.environ))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment |= {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1" if arguments.dry_run else "0"}
    job = {
        "device": "cpu" if arguments.dry_run else "cuda:0",
        "dry": arguments.dry_run,
        "work": str(arguments.work),
        "routes": None if arguments.routes is None else str(arguments.routes),
        **case,
    }
    entry, begin = report.begin(step.name, case), time.monotonic()
    command = worker_command(Path(__file__).resolve(), step.name, job)
    seconds = step.most_s if step.name == "card" else min(step.most_s, left)
    try:
        say(f"{step.name} {' '.join(str(value) for value in case.values())}".strip())
        ended = run_step(command, environment, seconds, lambda told: report.add(entry, told))
    except KeyboardInterrupt:
        report.end(entry, INTERRUPTED, time.monotonic() - begin, "Ctrl-C")
        raise
    report.end(entry, ended.status, ended.seconds, ended.error)
    if ended.status not in (OK, UNAVAILABLE):
        say(f"  {ended.status}: {(ended.error or '').splitlines()[-1]}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    steps = "\n".join(f"  {step.name:18} {step.about}" for step in STEPS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"steps:\n{steps}"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("gpu_report.json"), help="(gpu_report.json)")
    parser.add_argument("--minutes", type=float, metavar="N", default=25, help="steps that do not fit are skipped (25)")
    parser.add_argument("--only", metavar="STEPS", help="names, comma separated; card and models come along")
    parser.add_argument("--device", default="cuda:0", metavar="cuda:N", help="the card (cuda:0)")
    parser.add_argument("--routes", type=Path, metavar="TRACE", help="routes to force through the routers: a trace, or "
                        "what `moeflow trace convert` reads; models then have the experts of its model")  # fmt: skip
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="of the random models, 25 GB (in moeflow's cache)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, kernels in Triton's interpreter")
    parser.add_argument("--worker", metavar="STEP", help=argparse.SUPPRESS)
    parser.add_argument("job", nargs="?", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.worker:
        if arguments.job is not None:
            parser.error(f"unrecognized arguments: {arguments.job}")
        try:
            arguments.only = arguments.only and [name.strip() for name in arguments.only.split(",")]
            select(arguments.only)
        except ValueError as error:
            parser.error(f"--only {error}")
        if arguments.minutes <= 0:
            parser.error("--minutes must be above 0")
        kind, _, number = arguments.device.partition(":")
        if kind != "cuda" or not (number or "0").isdigit():
            parser.error(f'--device {arguments.device}: allowed are "cuda" and "cuda:N"')
        arguments.device = "cpu" if arguments.dry_run else arguments.device
        arguments.work = arguments.work or cache_folder() / "gpu_report"
        arguments.out, arguments.work = arguments.out.absolute(), arguments.work.absolute()
        arguments.routes = arguments.routes and arguments.routes.absolute()
    return arguments


def say(text: str) -> None:
    """Tell progress on standard error."""
    print(f"report: {text}", file=sys.stderr, flush=True)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


if __name__ == "__main__":
    sys.exit(main())
