"""Check the types of the package as it is installed, and of a user's program that imports it, with mypy."""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Return 0 where all types fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", nargs="?", help="without it the files are laid out as a wheel has them, from here")
    wheel = parser.parse_args(argv).wheel
    with tempfile.TemporaryDirectory() as folder:
        if wheel:
            zipfile.ZipFile(wheel).extractall(folder)
        else:
            lay_out = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py"]
            subprocess.run([*lay_out, "--build-lib", folder], cwd=ROOT, check=True)
        if not (Path(folder) / "moeflow/py.typed").is_file():
            print("py.typed is not among the installed files: type checkers would ignore every annotation")
            return 1
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
        mypy += ["--cache-dir", str(ROOT / ".mypy_cache")]
        package = subprocess.run([*mypy, "-p", "moeflow"], cwd=folder, env=environment)
        user = [*mypy, "--strict", "--follow-imports", "silent", str(ROOT / "tests/typing/consumer.py")]
        program = subprocess.run(user, cwd=folder, env=environment)
    return package.returncode or program.returncode


if __name__ == "__main__":
    sys.exit(main())
