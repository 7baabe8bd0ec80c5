"""Steps that run other programs: pytest, the kernels' benchmark, compute-sanitizer."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.card import find_tool
from gpu.worker import Tell, UnavailableError

ROOT = Path(__file__).resolve().parents[2]
CLAIMS, CUDA = "tests/helpers/triton_claims.py", "tests"
_CHECK = [sys.executable, "scripts/bench_triton.py", "--check"]
_FEW = ["--formats", "bfloat16", "int4-g64", "mxfp4", "fp8", "q4_k", "q6_k"]  # a sanitizer makes everything slow
_LONG = 100  # failures that are named


def claims(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Run the kernels' claims; without pytest, the check of their benchmark."""
    if _missing():
        return {"instead": "bench_triton.py --check", **_checked(_CHECK, {})}
    return pytest_run(["--noconftest", *_chosen(job), CLAIMS], {})


def cuda_tests(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Run `pytest -m gpu`, but for the claims, which have a step of their own; a dry run collects them only."""
    _require_pytest()
    only = ["--collect-only", "tests/kernels/test_cuda.py"] if job["dry"] else [CUDA]
    return pytest_run(["-m", "gpu", "-k", job.get("tests", "not triton_claims"), *only], {})


def races(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Run the CUDA tests or the claims under torch's own race detector."""
    _require_pytest()
    detector = {"TORCH_CUDA_SANITIZER": "1"}
    if job["over"] == "claims":
        return pytest_run(["--noconftest", CLAIMS], detector)
    return pytest_run(["-m", "gpu", "-k", "not triton_claims", CUDA], detector)


def compute_sanitizer(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Run the check of the kernels under one of compute-sanitizer's tools.

    Raises:
        UnavailableError: it is not installed.
    """
    program = find_tool("compute-sanitizer")
    if program is None:
        raise UnavailableError("compute-sanitizer is not installed: it is part of the CUDA toolkit")
    tool = ["--tool", job["tool"], "--target-processes", "all", "--error-exitcode", "86"]
    # The caching allocator would hide reads beyond a tensor inside its blocks.
    return _checked([program, *tool, *_CHECK, *_FEW], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def kernels(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Run the kernels' benchmark format by format; one that fails is named, and the others run."""
    import bench_triton

    dry, failed = job["dry"], []
    for name in job.get("formats", bench_triton.DEFAULT_FORMATS):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                code = bench_triton.main(["--formats", name, *(["--check"] if dry else [])])
            if code:
                raise UnavailableError("the Triton kernels do not run here")
        except (RuntimeError, AssertionError, OSError) as error:
            failed.append(name)
            tell({"format": name, "error": str(error)[:500]})
            continue
        for row in json.loads(printed.getvalue().splitlines()[-1])["rows"]:
            tell(row)
    assert not failed, f"failed: {', '.join(failed)}"
    return {}


def pytest_run(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run pytest; return how many tests passed, failed and were skipped.

    Raises:
        AssertionError: some failed; names them.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", *arguments]
    code, output = _run(command, environment)
    found = counts(output)
    assert code in (0, 5), f"{found}\n{_failures(output)}\n{output[-2000:]}"  # 5: no test was chosen
    return found


def counts(output: str) -> dict[str, int]:
    """Return the numbers of pytest's last line that has some: {"passed": 3, ...}."""
    for line in reversed(output.splitlines()):
        found = re.findall(r"(\d+)(?:/\d+)? (passed|failed|skipped|errors?|deselected|tests collected)", line)
        if found:
            return {kind: int(number) for number, kind in found}
    return {}


def _failures(output: str) -> str:
    return "\n".join([line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))][:_LONG])


def _checked(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a program whose success is its exit code."""
    code, output = _run(command, environment)
    assert code == 0, f"exit code {code}\n{output[-3000:]}"
    return {"last_line": output.strip().splitlines()[-1][:300] if output.strip() else ""}


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a program; its output goes to standard error too, so that one that is cut says how far it came."""
    lines = []
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None, "opened as a pipe"
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def _chosen(job: dict[str, Any]) -> list[str]:
    return ["-k", job["tests"]] if "tests" in job else []


def _missing() -> list[str]:
    """List what the tests need beside moeflow's own requirements and is not installed."""
    return [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]


def _require_pytest() -> None:
    if _missing():
        raise UnavailableError(f"{' and '.join(_missing())} not installed: pip install pytest hypothesis")
