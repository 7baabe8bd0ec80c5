"""Build a wheel with the compiled libraries inside, for Linux with glibc 2.28 or later, and check what it holds.

    python scripts/build_wheel.py [--machine x86_64] [--outdir dist]

Needs the packages build and ziglang, and no compiler: zig compiles for either machine on any.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
MACHINES = ("x86_64", "aarch64")
_GLIBC = (2, 28)
_NOT_SHIPPED = (".c", ".cpp", ".h", ".md", ".so", ".pyc")
_SOURCES = ("moeflow", "kernels", "placement", "predictors", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def build(machine: str, outdir: Path) -> Path:
    """Build the wheel for a machine from a copy of the sources, free of what earlier builds left, and return it."""
    import ziglang

    with tempfile.TemporaryDirectory() as folder:
        for name in _SOURCES:
            source, target = ROOT / name, Path(folder) / "moeflow" / name
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(source, target)
        environment = {
            **os.environ,
            "MOEFLOW_ZIG": str(Path(ziglang.__file__).with_name("zig")),
            "MOEFLOW_TARGET": f"{machine}-linux-gnu.{_GLIBC[0]}.{_GLIBC[1]}",
            "MOEFLOW_PLATFORM": f"manylinux_{_GLIBC[0]}_{_GLIBC[1]}_{machine}",
        }
        built = Path(folder) / "dist"
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(built), f"{folder}/moeflow"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
        (wheel,) = built.glob("*.whl")
        outdir.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, outdir))


def faults(wheel: Path) -> list[str]:
    """List what is wrong with a wheel: files of the package left out or too many, a library absent or too new."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        expected = _expected_files()
        found += [f"{name} is left out" for name in sorted(expected - names)]
        found += [f"{name} has no place in it" for name in sorted(names - expected)]
        for name in sorted(name for name in names if name.endswith(".so")):
            versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", archive.read(name))
            newest = max(((int(major), int(minor)) for major, minor in versions), default=(0, 0))
            if newest > _GLIBC:
                found.append(f"{name} needs glibc {newest[0]}.{newest[1]}")
    return found


def _expected_files() -> set[str]:
    """Return the paths inside a wheel of every library and of every file of this checkout but C sources and notes."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    paths = {library["name"].replace(".", "/") + ".so" for library in setuptools["ext-modules"]}
    for package, folder in setuptools["package-dir"].items():
        inside = package.replace(".", "/")
        files = [file for file in (ROOT / folder).rglob("*") if file.is_file() and file.suffix not in _NOT_SHIPPED]
        paths |= {f"{inside}/{file.relative_to(ROOT / folder).as_posix()}" for file in files}
    return paths


def main() -> None:
    """Build one wheel, print its path, and stop with what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=MACHINES, default=MACHINES[0])
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    wheel = build(arguments.machine, arguments.outdir)
    if wrong := faults(wheel):
        sys.exit(f"{wheel}:\n" + "\n".join(wrong))
    print(wheel)


if __name__ == "__main__":
    main()
