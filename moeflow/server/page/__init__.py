"""The page at `/`: a chat in the browser, in one file without anything from elsewhere.

Knows the server's endpoints as any client does. Knows nothing of engines or models. Only `server/` imports it.
"""
