"""Calibration text that exists on every machine: text that the model writes itself, and Python's own library.

Knows prompts and source files, and gives lists of token ids. Knows nothing of experts or checkpoints.
"""

import inspect
import logging
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeflow.hf.encoding import encode_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOPICS = (
    "the history of Portugal",
    "volcanoes",
    "a lighthouse keeper",
    "the French Revolution",
    "photosynthesis",
    "football",
    "the Roman army",
    "jazz music",
    "prime numbers",
    "the planet Jupiter",
    "bread baking",
    "steam railways",
    "whales",
    "a medieval cathedral",
    "electric circuits",
    "the river Nile",
    "chess",
    "vaccines",
    "a small fishing village",
    "the Second World War",
    "sorting algorithms",
    "Japanese gardens",
    "a television series",
    "inflation and interest rates",
    "beetles",
    "the novels of Charles Dickens",
    "hurricanes",
    "a warship of the royal navy",
    "the human heart",
    "fractions and percentages",
    "mountain climbing",
    "a video game",
    "the city of Chicago",
    "kings and queens of England",
    "honey bees",
    "a detective in London",
    "climate change",
    "linear equations",
    "an opera singer",
    "ancient Egypt",
    "computer networks",
    "wolves",
    "highways and bridges",
    "a court case",
    "the moon landing",
    "tea and coffee",
    "an old sea captain",
    "the periodic table",
    "elections and parliaments",
    "dinosaurs",
    "an American rock band",
    "databases",
    "a horse race",
    "Buddhism",
    "rain forests",
    "two sisters and their letters",
    "the stock market",
    "basketball players",
    "glaciers",
    "a film director",
    "sleep and health",
    "birds of Australia",
    "probability",
    "a church and its bells",
)

CHAT_REQUESTS = (
    "Write a detailed encyclopedia article about {topic}.",
    "Explain {topic} to a curious friend, with examples.",
    "Tell me a short story about {topic}.",
    "Give me a list of ten facts about {topic}.",
    "Write a newspaper report about {topic}.",
    "What should a beginner know about {topic}?",
    "Make up a word problem about {topic} and solve it step by step.",
    "Write a Python program with comments about {topic}.",
    "Write a dialogue between a teacher and a student about {topic}.",
    "Summarize the most important events and dates concerning {topic}.",
    "Answer in one or two sentences: what is special about {topic}?",
    "Which places, people and numbers come up most often when people talk about {topic}?",
)

PLAIN_OPENINGS = (
    "{Topic}: an overview. Many people think that",
    "In 1897, a book on {topic} was published. The author,",
    'It was late in the evening, and the talk had turned to {topic}. "I do not believe',
    "This article is about {topic}. The name comes from",
    "Chapter I.\n\n{Topic}.\n\nWhen I was a boy, my father",
    "The first known mention of {topic} is found in",
    "According to critics, the film about {topic} was",
    "Between 1914 and 1945, {topic} changed greatly. During the first years,",
    "She had never cared for {topic}, but that morning she",
    "Introduction\n\nThis paper examines {topic}. Our results show that",
    "LONDON - A new report on {topic} said on Tuesday that the government",
    "The museum's collection on {topic} was founded by",
)

# Programs first, then tools and data formats; a file that this Python lacks is passed over.
LIBRARY_FILES = (
    "argparse.py",
    "ast.py",
    "bisect.py",
    "calendar.py",
    "collections/__init__.py",
    "configparser.py",
    "csv.py",
    "datetime.py",
    "difflib.py",
    "email/message.py",
    "fractions.py",
    "heapq.py",
    "html/parser.py",
    "http/client.py",
    "inspect.py",
    "json/decoder.py",
    "logging/__init__.py",
    "random.py",
    "shutil.py",
    "socketserver.py",
    "statistics.py",
    "string.py",
    "textwrap.py",
    "unittest/case.py",
)


def calibration_prompts(tokenizer: "PreTrainedTokenizerBase", num_prompts: int, seed: int) -> list[list[int]]:
    """Return the token ids of varied prompts, half of them chat requests and half openings of plain text.

    Args:
        tokenizer: a transformers tokenizer; without a chat template every prompt is plain text.
        num_prompts: how many prompts.
        seed: decides which topic meets which form.

    Raises:
        MoeflowError: the chat template fails, or leaves the request out.
    """
    order = random.Random(seed)
    topics = list(TOPICS)
    prompts = []
    for i in range(num_prompts):
        if i % len(topics) == 0:
            order.shuffle(topics)
        topic = topics[i % len(topics)]
        if i % 2 == 0 and tokenizer.chat_template:
            request = CHAT_REQUESTS[i // 2 % len(CHAT_REQUESTS)].format(topic=topic)
            prompts.append(encode_messages(tokenizer, [{"role": "user", "content": request}]))
        else:
            opening = PLAIN_OPENINGS[i // 2 % len(PLAIN_OPENINGS)]
            text = opening.format(topic=topic, Topic=topic[0].upper() + topic[1:])
            prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompts


def sample_continuations(
    model: "PreTrainedModel",
    prompts: list[list[int]],
    num_new_tokens: int,
    stop_id: int | None,
    seed: int,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Let a model continue all prompts in one batch and return prompt and continuation of each, cut at `stop_id`.

    Args:
        model: a transformers causal language model.
        prompts: token ids of each prompt.
        num_new_tokens: tokens sampled after each prompt.
        stop_id: token id that ends a text (it is kept), or None.
        seed: seed of the sampling; row i draws at a temperature between 0.6 and 1.0.
        on_token: called once a sampled position.
    """
    import torch
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, prompts))
    rows = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])  # left padding: [B, longest]
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    temperature = torch.linspace(0.6, 1.0, 5)[torch.arange(len(prompts)) % 5, None]
    known = inspect.signature(model.forward).parameters  # transformers 5.24 renamed the argument, and warns
    cache: dict[str, Any] = {"cache" if "cache" in known else "past_key_values": DynamicCache(config=model.config)}
    step, positions, sampled = rows, (mask.cumsum(1) - 1).clamp(min=0), []
    with torch.inference_mode():
        for _ in range(num_new_tokens):
            logits = model(
                input_ids=step, attention_mask=mask, position_ids=positions, logits_to_keep=1, **cache
            ).logits[:, -1]
            values, ids = logits.float().topk(min(100, logits.shape[-1]))
            choice = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
            step = ids.gather(1, choice)  # [B, 1]
            sampled.append(step)
            mask = torch.cat([mask, torch.ones_like(step)], dim=1)
            positions = positions[:, -1:] + 1
            on_token()
    texts = []
    for prompt, continuation in zip(prompts, torch.cat(sampled, dim=1).tolist(), strict=True):
        if stop_id in continuation:
            continuation = continuation[: continuation.index(stop_id) + 1]
        texts.append(prompt + continuation)
    return texts


def library_texts(tokenizer: "PreTrainedTokenizerBase", num_tokens: int, piece_tokens: int = 256) -> list[list[int]]:
    """Return pieces of the Python standard library: two thirds source code, one third its English help pages.

    Args:
        tokenizer: a transformers tokenizer.
        num_tokens: tokens wanted in all; fewer come back when this Python was installed without its sources.
        piece_tokens: tokens of one piece.
    """
    num_pieces = -(-num_tokens // piece_tokens)
    sources = _pieces(tokenizer, _library_sources(), piece_tokens)
    help_pages = _pieces(tokenizer, _library_help(), piece_tokens)
    help_pages = help_pages[: num_pieces // 3] if sources else help_pages
    texts = sources[: num_pieces - len(help_pages)] + help_pages
    if len(texts) < num_pieces:
        logger.warning("standard library sources give %d of %d calibration pieces", len(texts), num_pieces)
    return texts[:num_pieces]


def _library_sources() -> list[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = []
    for name in LIBRARY_FILES:
        try:
            sources.append((stdlib / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            logger.info("%s is not in this standard library; passing it over", stdlib / name)
    return sources


def _library_help() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [topics[name] for name in sorted(topics) if len(topics[name]) > 4000]


def _pieces(tokenizer: "PreTrainedTokenizerBase", texts: list[str], piece_tokens: int) -> list[list[int]]:
    """Cut texts into pieces and order them first pieces first, so that a short selection draws on every text."""
    characters = piece_tokens * 6  # enough for one piece of any of these texts
    ranked = []
    for text_index, text in enumerate(texts):
        for rank, start in enumerate(range(0, min(len(text), 8 * characters), characters)):
            ids = tokenizer(text[start : start + characters], add_special_tokens=False)["input_ids"][:piece_tokens]
            if len(ids) == piece_tokens:
                ranked.append((rank, text_index, ids))
    return [ids for _, _, ids in sorted(ranked)]
