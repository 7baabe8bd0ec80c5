"""What each path answers: fields of a body to SamplingParams, and outputs of the engine to OpenAI's forms.

Knows bodies and the service. Knows nothing of sockets, threads or the engine's steps. Only `server/` imports it.
"""
