"""What an answer says beside its text: reasoning and tool calls, in the marks of the model's family.

Knows transformers' response parser, and tools. Knows nothing of HTTP or engines. Only `server/` imports it.
"""
