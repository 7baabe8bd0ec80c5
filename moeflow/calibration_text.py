"""What a model is calibrated on: windows of tokens, cut from a text, or from texts every machine has."""

from moeflow.demo_text import library_texts
from moeflow.errors import ConfigError

_WINDOW_TOKENS = 256
_CHARACTERS_OF_TOKEN = 8  # more than any text takes on average: a window is cut from that many


def cut_windows(tokenizer, text: str | None, num_tokens: int) -> list[list[int]]:
    """Cut windows of 256 tokens, evenly spread over a text; None takes the Python standard library's.

    Raises:
        ConfigError: the text is shorter than one window.
    """
    count = max(num_tokens // _WINDOW_TOKENS, 1)
    if text is None:
        windows = library_texts(tokenizer, count * _WINDOW_TOKENS, _WINDOW_TOKENS)
    else:
        span = _WINDOW_TOKENS * _CHARACTERS_OF_TOKEN
        count = max(min(count, len(text) // span), 1)
        starts = [max(len(text) - span, 0) * i // max(count - 1, 1) for i in range(count)]
        pieces = [tokenizer(text[s : s + span], add_special_tokens=False)["input_ids"] for s in starts]
        windows = [piece[:_WINDOW_TOKENS] for piece in pieces if len(piece) >= _WINDOW_TOKENS]
    if not windows:
        raise ConfigError(
            f"the calibration text has fewer than {_WINDOW_TOKENS} tokens. Give a longer one; some 100 kB are enough."
        )
    return windows
