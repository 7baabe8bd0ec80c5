"""One sequence at a time, for families whose state of earlier positions only their own code knows.

Knows steps of `generate` and the caches that they return, as wholes. Knows nothing of what lies in them. `chat/`,
`server/` and `cli/` import it.
"""
