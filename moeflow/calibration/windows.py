"""Windows of tokens for calibration, cut from a text, or from texts that every machine has.

Knows tokenizers. Knows nothing of experts.
"""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeflow.calibration.sample_texts import calibration_prompts, library_texts, sample_continuations
from moeflow.errors import ConfigError
from moeflow.hf.encoding import encode_text
from moeflow.progress import ProgressCallback

_WINDOW_TOKENS = 256
_VARIED_TOKENS = 128  # shorter: more topics for the same work
_CHARACTERS_A_TOKEN = 8  # more than any text takes on average: a window is cut from that many
_SEED = 0


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str | None, num_tokens: int) -> list[list[int]]:
    """Cut windows of 256 tokens, evenly spread over a text.

    Args:
        tokenizer: the model's.
        text: to cut; None takes the Python standard library's.
        num_tokens: of all windows.

    Raises:
        ConfigError: the text is shorter than one window.
    """
    count = max(num_tokens // _WINDOW_TOKENS, 1)
    if text is None:
        windows = library_texts(tokenizer, count * _WINDOW_TOKENS, _WINDOW_TOKENS)
    else:
        span = _WINDOW_TOKENS * _CHARACTERS_A_TOKEN
        count = max(min(count, len(text) // span), 1)
        starts = [max(len(text) - span, 0) * i // max(count - 1, 1) for i in range(count)]
        pieces = [encode_text(tokenizer, text[s : s + span], special_tokens=False) for s in starts]
        windows = [piece[:_WINDOW_TOKENS] for piece in pieces if len(piece) >= _WINDOW_TOKENS]
    if not windows:
        raise ConfigError(
            f"the calibration text has fewer than {_WINDOW_TOKENS} tokens. Give a longer one; some 100 kB are enough."
        )
    return windows


def varied_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    progress: ProgressCallback = lambda done, of: None,
) -> list[list[int]]:
    """Return windows of 128 tokens: half are written by the model, half are of the Python standard library, in turn.

    The model's own text begins with chat requests and openings of plain text on many topics, so it is of the kinds that
    the model was trained on, as one domain's text is not.

    Args:
        model: a causal language model whose experts are exact.
        tokenizer: the model's.
        num_tokens: tokens of all windows.
        progress: called with (tokens written a prompt, tokens in all).
    """
    count = max(num_tokens // _VARIED_TOKENS, 2)
    prompts = calibration_prompts(tokenizer, count - count // 2, _SEED)
    prompts = [prompt[: _VARIED_TOKENS // 2] for prompt in prompts]
    new_tokens = _VARIED_TOKENS - min(map(len, prompts))
    done = 0

    def on_token() -> None:
        nonlocal done
        done += 1
        progress(done, new_tokens)

    # Past its end-of-text token a model begins another text: fine, and every window is full.
    written = sample_continuations(model, prompts, new_tokens, None, _SEED, on_token)
    library = library_texts(tokenizer, count // 2 * _VARIED_TOKENS, _VARIED_TOKENS)
    windows = []
    for place, text in enumerate(written):
        windows += [text[:_VARIED_TOKENS], *library[place : place + 1]]
    return windows
