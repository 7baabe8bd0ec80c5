"""Images beside a prompt's tokens: processors, prompts that show images, steps of `generate` that look at them.

Knows transformers' processors and the inputs of vision models. Knows nothing of files of images, requests or HTTP.
`engine/`, `server/` and `cli/` import it.
"""
