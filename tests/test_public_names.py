"""The public names of moeflow: each is there, none loads torch before it is used, type checkers find them."""

import ast
import importlib
import subprocess
import sys

import pytest

import moeflow
from helpers.paths import ROOT


def test_the_public_names_are_listed():
    assert set(moeflow.__all__) == {"fit", "load_moe", "Engine", "SamplingParams", "MoeflowError", "__version__"}
    assert set(moeflow.__all__) <= set(dir(moeflow))
    assert moeflow.MoeflowError.__module__ == "moeflow.errors"


def test_a_type_checker_sees_each_name_at_the_home_it_is_loaded_from():
    tree = ast.parse((ROOT / "moeflow/__init__.py").read_text())
    (types,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in types.body for alias in node.names}
    assert seen == moeflow._HOMES
    assert set(seen) == set(moeflow.__all__) - {"__version__"}
    assert (ROOT / "moeflow/py.typed").is_file()


@pytest.mark.torch
def test_each_name_is_loaded_from_its_home():
    for name, home in moeflow._HOMES.items():
        if name != "fit":  # which is a room, too
            assert getattr(moeflow, name) is getattr(importlib.import_module(home), name)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = moeflow.load_model


def test_importing_takes_less_than_a_tenth_of_a_second():
    code = "import time; start = time.perf_counter(); import moeflow; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.1


@pytest.mark.torch
def test_the_engine_is_also_named_by_its_room():
    from moeflow.engine import Engine

    assert Engine is moeflow.Engine
