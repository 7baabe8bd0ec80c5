"""Annotations: functions of the package name the type of what they return, public ones those of their arguments too."""

from helpers.layout_checks import functions_are_annotated
from helpers.paths import ROOT
from helpers.source_tree import SourceTree


def test_functions_are_annotated():
    wrong = list(functions_are_annotated(SourceTree(ROOT)))
    assert not wrong, "\n".join(wrong)
