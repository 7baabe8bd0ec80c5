"""The chat page: one self-contained response, made of the files beside this one.

Knows files and hashes. Knows nothing of requests, engines or models.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent
_SCRIPTS = ("markdown.js", "conversations.js", "requests.js", "view.js", "figures.js", "main.js")  # in this order


class Page(NamedTuple):
    """What a browser gets.

    Args:
        html: UTF-8.
        policy: its Content-Security-Policy: this page's own style and script, and requests to this server alone.
    """

    html: bytes
    policy: str


@cache
def page() -> Page:
    """Put the page together."""
    style = _read("style.css")
    script = "\n".join(_read(name) for name in _SCRIPTS)
    html = _read("page.html").replace("/* style.css */", style).replace("/* scripts */", script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html.encode(), policy)


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
