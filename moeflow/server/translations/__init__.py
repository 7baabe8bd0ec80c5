"""Other forms of the same conversation: OpenAI's /v1/responses and Anthropic's /v1/messages.

Knows bodies and parts of answers. A body becomes one of /v1/chat/completions, which is read as any other; so a field
means the same everywhere. Knows nothing of engines or prompts. Only `server/` imports it.
"""
