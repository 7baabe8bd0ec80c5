"""docs/api.md holds the public names as their docstrings describe them."""

import moeflow
import write_api_docs as script
from helpers.paths import ROOT


def test_page_is_what_the_docstrings_say():
    name = script.differing((ROOT / "docs" / "api.md").read_text())
    assert name is None, f"docs/api.md differs from the source of `{name}`: run python scripts/write_api_docs.py"


def test_every_public_name_is_on_the_page():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in moeflow.__all__:
        assert name.startswith("__") or f"## {name}\n" in text or f"| `{name}` |" in text, f"docs/api.md lacks {name}"


def test_check_names_what_differs(tmp_path, monkeypatch, capsys):
    page = tmp_path / "api.md"
    monkeypatch.setattr(script, "PAGE", page)
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    page.write_text(page.read_text().replace("### Engine.cancel", "### Engine.stop"))
    assert script.main(["--check"]) == 1
    assert "Engine" in capsys.readouterr().err
