"""A file of prompts in, a file of answers out, written as answers end and continued after a kill.

Knows the engine and requests. Knows nothing of the terminal or of HTTP. `server/` (for OpenAI's forms) and `cli/`
import it.
"""
