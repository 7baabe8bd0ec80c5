"""GET /: the chat page.

Knows the page as bytes.
"""

from starlette.requests import Request
from starlette.responses import Response

from moeflow.server.page.page import page


async def show_page(request: Request) -> Response:
    """Return the page; it asks for the API key itself where there is one."""
    html, policy = page()
    headers = {"content-security-policy": policy, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)
