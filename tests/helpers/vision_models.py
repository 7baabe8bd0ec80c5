"""Tiny vision models with processors of their own, and images."""

import base64
import io
from dataclasses import replace

import numpy as np
import transformers
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_tokenizers import letter_tokenizer
from moeflow.hf.vision.processors import without_videos

_SIZES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
_TEMPLATE = (
    "{% if tools %}{{ tools }} {% endif %}{% for m in messages %}{{ m['role'] }}:"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}BEGINIMAGEEND{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}assistant:"
)
# family: (processor, images' part of it, tokens: the image, its begin, its end and others, names of their ids)
_PARTS = {
    "qwen3_vl_moe": (
        "Qwen3VLProcessor",
        Qwen2VLImageProcessorPil,
        ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
        ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id"),
    ),
    "glm4v_moe": (
        "Glm4vProcessor",
        Glm4vImageProcessorPil,
        ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>"),
        ("image_token_id", "image_start_token_id", "image_end_token_id", "video_token_id"),
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeProcessor",
        Ernie4_5_VLMoeImageProcessorPil,
        *[
            ("<|IMAGE|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
            ("image_token", "image_start_token", "image_end_token", "video_token", "video_start_token"),
        ],
    ),
}


def vision_model(name, make_tokenizer=letter_tokenizer, vocab_size=128):
    """A random model of a family, and its processor; a token is a letter, or what another tokenizer makes of them."""
    processor_class, image_processor, tokens, names = _PARTS[name]
    tokenizer = make_tokenizer(additional_special_tokens=list(tokens))
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if name == "ernie4_5_vl_moe":
        names = [*names, "video_end_token"]
        for attribute, token, id in zip(names, tokens, ids, strict=True):
            setattr(tokenizer, attribute, token)
            setattr(tokenizer, f"{attribute}_id", id)
        names = [f"{attribute}_id" for attribute in names]
    image, begin, end = tokens[:3]
    template = _TEMPLATE.replace("BEGINIMAGEEND", begin + image + end)
    tokenizer.chat_template = template
    processor = without_videos(getattr(transformers, processor_class))(
        image_processor(**_SIZES), tokenizer, chat_template=template
    )
    family = FAMILIES[name]
    of_text = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    of_text |= family.overrides.get("text_config", {}) | {"max_position_embeddings": 1024, "vocab_size": vocab_size}
    overrides = {**family.overrides, **dict(zip(names, ids, strict=True)), "text_config": of_text}
    return build_model(replace(family, overrides=overrides)), processor


def picture(seed, width=40, height=24):
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def data_url(image, kind="png", **options):
    """An image as a data URL."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(image, **options):
    """An image as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(image, **options)}}
