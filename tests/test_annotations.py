"""Annotations: every public function and method of the package names the types of its arguments and of its return."""

from helpers.layout_checks import public_functions_are_annotated
from helpers.paths import ROOT
from helpers.source_tree import SourceTree


def test_public_functions_are_annotated():
    wrong = list(public_functions_are_annotated(SourceTree(ROOT)))
    assert not wrong, "\n".join(wrong)
