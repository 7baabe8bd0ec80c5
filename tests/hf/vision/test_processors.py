"""Processors of images: what a folder has, what it lacks, and prompts that show every image and every word."""

import json

import pytest
from transformers.utils import is_torchvision_available

from helpers.families import FAMILIES
from helpers.family_models import build_model
from helpers.small_tokenizers import letter_tokenizer
from helpers.vision_models import picture, vision_model
from moeflow.errors import ConfigError
from moeflow.hf.vision.image_prompt import encode_with_images
from moeflow.hf.vision.processors import load_processor, why_no_images


@pytest.fixture(scope="module")
def vision():
    return vision_model("qwen3_vl_moe")


def shows(*images, text="see"):
    parts = [{"type": "text", "text": text}, *({"type": "image", "image": one} for one in images)]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_a_saved_processor_is_loaded_without_torchvision_and_makes_the_same_prompt(name, tmp_path):
    model, processor = vision_model(name)
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reason = load_processor(tmp_path)
    assert reason == ""
    assert why_no_images(model, loaded) == ""
    one, other = (encode_with_images(each, shows(picture(0))) for each in (processor, loaded))
    assert one.token_ids == other.token_ids
    assert one.images.key == other.images.key


def test_a_folder_of_text_alone_says_so(tmp_path):
    letter_tokenizer().save_pretrained(tmp_path)
    assert load_processor(tmp_path) == (None, "its checkpoint has no processor of images")


@pytest.mark.parametrize(
    "written", ["{", "[]", '{"processor_class": "NoSuchProcessor"}', '{"processor_class": "BertModel"}']
)
def test_what_cannot_be_loaded_is_a_reason_and_no_error(written, tmp_path):
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(written)
    processor, reason = load_processor(tmp_path)
    assert processor is None
    assert reason


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_a_family_whose_images_only_torchvision_reads_is_told(tmp_path):
    letter_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"processor_class": "Llama4Processor", "image_processor_type": "Llama4ImageProcessor"})
    )
    processor, reason = load_processor(tmp_path)
    assert processor is None
    assert "orchvision" in reason


def test_a_model_that_is_loaded_without_its_vision_tower_is_told(vision):
    assert "takes text alone" in why_no_images(build_model(FAMILIES["mixtral"]), vision[1])


def test_keys_differ_with_images_and_their_order_and_with_nothing_else(vision):
    _, processor = vision
    one, two = picture(0), picture(1)
    keys = [encode_with_images(processor, shows(*of)).images.key for of in ((one,), (two,), (one, two), (two, one))]
    assert len(set(keys)) == 4
    longer = encode_with_images(processor, [*shows(one), {"role": "assistant", "content": "yes"}, *shows(text="more")])
    assert longer.images.key == keys[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|image_pad|>{% endif %}"
        "{% endfor %}{% endfor %}",
        "{% for p in messages[-1]['content'] %}{% if p['type'] == 'image' %}<|image_pad|>{% else %}{{ p['text'] }}"
        "{% endif %}{% endfor %}",
        "{{ raise_exception('no images here') }}",
    ],
)
def test_a_template_that_leaves_out_an_image_or_a_word_is_refused(vision, template, monkeypatch):
    monkeypatch.setattr(vision[1], "chat_template", template)
    messages = [*shows(picture(0)), {"role": "assistant", "content": "yes"}, *shows(picture(1))]
    with pytest.raises(ConfigError, match=r"leaves out|refuses"):
        encode_with_images(vision[1], messages)


def test_a_text_far_longer_than_the_context_is_cut_and_still_too_long(vision):
    prompt = encode_with_images(vision[1], shows(picture(0), text="x" * 300_000), 64)
    assert prompt.images is None
    assert 128 < len(prompt.token_ids) < 300_000
