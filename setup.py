"""How the compiled libraries are built; all else stands in pyproject.toml.

They are loaded by ctypes and know nothing of Python, so neither their names nor the wheel's name a Python ABI. Where
MOEFLOW_ZIG and MOEFLOW_TARGET are set, as scripts/build_wheel.py does, zig builds them for another machine and an older
glibc.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from moeflow.c_library import sources_checksum


class BuildLibraries(build_ext):
    """Builds libraries under plain names, `_cpu.so`."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        checksum = sources_checksum(Path(ext.sources[0]).parent)
        ext.extra_compile_args += ["-include", "moeflow/_sources.h", f"-DMOEFLOW_SOURCES={checksum}u"]
        ext.depends += ["moeflow/_sources.h", *map(str, Path(ext.sources[0]).parent.glob("*.[ch]*"))]
        zig = os.environ.get("MOEFLOW_ZIG")
        if not zig:
            super().build_extension(ext)
            return
        path = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        compiler = [zig, "c++" if ext.language == "c++" else "cc", "-target", os.environ["MOEFLOW_TARGET"]]
        flags = ["-shared", "-fPIC", "-s", *ext.extra_compile_args]
        subprocess.run([*compiler, *flags, *ext.sources, "-lm", "-o", path], check=True)


class TagForAnyPython(bdist_wheel):
    """Names the wheel after the machine alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", os.environ.get("MOEFLOW_PLATFORM") or super().get_tag()[2]


setup(cmdclass={"build_ext": BuildLibraries, "bdist_wheel": TagForAnyPython})
