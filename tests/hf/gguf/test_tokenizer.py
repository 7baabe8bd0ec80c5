"""Tokenizers of GGUF files give the ids and texts of the tokenizers that they were written from."""

import json
from functools import cache

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from helpers.gguf_tokenizers import KINDS, tokenizer_metadata, varied_texts
from helpers.small_tokenizers import sentencepiece_tokenizer
from moeflow.errors import CheckpointError, UnsupportedModelError
from moeflow.hf.encoding import encode_messages
from moeflow.hf.gguf.text_splits import SPLITS
from moeflow.hf.gguf.tokenizer import build_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<\uff5cUser\uff5c>"]
PLAIN = ["<think>", "</think>", "  \n"]
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# Splits as models' own tokenizer.json have them, built without the table.
OWN = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "deepseek-v3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥\u3040-ゟ゠-ヿ]+"), "isolated"),
            pre_tokenizers.Split(
                Regex(
                    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


@pytest.fixture(scope="module")
def trained():
    """Byte-level tokenizers of 700 tokens, merged over texts of all scripts, with special tokens and users' own."""

    @cache
    def make(pre="gpt-2"):
        split = OWN[pre]
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = split
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        texts = varied_texts(2000, seed=7)
        made.train_from_iterator(texts, BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
        made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
        made.add_tokens([AddedToken(word, normalized=False) for word in PLAIN])
        return made

    return make


def assert_same(own, tokenizer, texts):
    for text in texts:
        ids = own.encode(text).ids
        assert tokenizer(text)["input_ids"] == ids, repr(text)
        assert tokenizer.decode(ids) == own.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True) == own.decode(ids)


@pytest.mark.parametrize("pre", OWN)
def test_byte_level_ids_are_those_of_the_models_own_tokenizer(trained, pre):
    own = trained(pre)
    size = own.get_vocab_size() + 10  # rows that fill up the embeddings
    tokenizer = build_tokenizer(tokenizer_metadata(own, pre, size=size, special={"eos": own.token_to_id("<|im_end|>")}))
    assert_same(own, tokenizer, varied_texts(300, [*SPECIAL, *PLAIN]))
    assert len(tokenizer) == own.get_vocab_size()
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize(("pre", "cls"), [("qwen2", "Qwen2Tokenizer"), ("qwen35", "Qwen3_5Tokenizer")])
def test_ids_are_those_of_transformers_classes(trained, pre, cls):
    """Both compose letters and their marks, which llama.cpp leaves out."""
    fields = json.loads(trained().to_str())["model"]
    own = getattr(transformers, cls)(vocab=fields["vocab"], merges=[tuple(pair) for pair in fields["merges"]])
    tokenizer = build_tokenizer(tokenizer_metadata(own.backend_tokenizer, pre))
    assert_same(own.backend_tokenizer, tokenizer, [*varied_texts(300), "e\u0301"])


def test_splits_are_those_of_transformers_where_it_has_them():
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    theirs = mapping.GGUF_PRE_TOKENIZER_SPLITS
    shared = SPLITS.keys() & theirs.keys()
    assert len(shared) > 15
    assert {name: SPLITS[name].regexes for name in shared} == {name: (theirs[name],) for name in shared}


@pytest.mark.parametrize("pre", SPLITS)
def test_every_split_loses_no_letter(pre):
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r), "isolated") for r in SPLITS[pre].regexes])
    for text in varied_texts(40, seed=3):
        assert "".join(piece for piece, _ in split.pre_tokenize_str(text)) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "a12345 I'LL", ["a", "123", "45", " I", "'LL"]),
        ("qwen2", "a12 b", ["a", "1", "2", " b"]),
        ("gpt-4o", "HTTPServer's", ["HTTPServer's"]),
        ("gpt-4o", "camelCase", ["camel", "Case"]),
        ("tekken", "camelCase's 12", ["camel", "Case", "'s", " ", "1", "2"]),
        ("kimi-k2", "日本語abc", ["日本語", "abc"]),
        ("deepseek-llm", "ab12\n日本", ["ab", "1", "2", "\n", "日本"]),
        ("qwen2", "!\n\n", ["!\n\n"]),
        ("seed-coder", "!\n\n", ["!", "\n\n"]),
    ],
)
def test_splits_have_the_marks_of_their_kind(pre, text, pieces):
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r), "isolated") for r in SPLITS[pre].regexes])
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


def test_words_are_taken_whole_where_the_kind_says_so():
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE({**letters, "hello": 300}, []))  # no merge makes it
    fields = tokenizer_metadata(own, "llama-bpe", special={"bos": 5}, add_bos_token=False)
    fields["tokenizer.ggml.merges"] = []
    assert build_tokenizer(fields)("hello")["input_ids"] == [300]
    assert len(build_tokenizer({**fields, "tokenizer.ggml.pre": "glm4"})("hello")["input_ids"]) == 5


@pytest.mark.parametrize(
    ("pre", "more", "framed"),
    [
        ("llama-bpe", {}, (1, 0)),
        ("gpt-2", {}, (0, 0)),
        ("llama-bpe", {"add_bos_token": False}, (0, 0)),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, (1, 1)),
    ],
)
def test_texts_begin_and_end_as_the_file_says(trained, pre, more, framed):
    own = trained()
    ends = [own.token_to_id(word) for word in SPECIAL[:2]]
    fields = tokenizer_metadata(own, pre, special={"bos": ends[0], "eos": ends[1]}, **more)
    tokenizer = build_tokenizer(fields)
    plain = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert tokenizer("abc")["input_ids"] == ends[:1] * framed[0] + plain + ends[1:] * framed[1]


def test_a_beginning_without_a_token_is_refused(trained):
    with pytest.raises(CheckpointError, match=r"add_bos_token is true, and no tokenizer\.ggml\.bos_token_id"):
        build_tokenizer(tokenizer_metadata(trained(), "gpt-2", add_bos_token=True))


@pytest.fixture(scope="module")
def sentencepiece():
    own = sentencepiece_tokenizer().backend_tokenizer
    own.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<s>", "</s>")])
    own.add_tokens([AddedToken("<think>", normalized=False)])
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return own


def scored(own):
    """Its metadata as of SentencePiece's files: scores, and no merges."""
    fields = tokenizer_metadata(own, "default", model="llama", special={"bos": 1, "eos": 2, "unknown": 0})
    merges = fields.pop("tokenizer.ggml.merges")
    order = {"".join(merge.split(" ")): i for i, merge in enumerate(merges)}
    fields["tokenizer.ggml.scores"] = [-float(order.get(word, 1000)) for word in fields["tokenizer.ggml.tokens"]]
    return fields


TEXTS = [*varied_texts(300, ["<s>", "</s>", "<think>", " name: a", '{"', "nana me"])]


def test_sentencepiece_ids_are_those_of_the_models_own_tokenizer(sentencepiece):
    assert_same(sentencepiece, build_tokenizer(scored(sentencepiece)), TEXTS)


def test_runs_of_spaces_that_users_defined_are_merged_as_any_token():
    own = Tokenizer(models.BPE({"<unk>": 0, "\u2581": 1, "\u2581\u2581": 2, "a": 3}, [("\u2581", "\u2581")]))
    own.normalizer = normalizers.Replace(" ", "\u2581")
    own.add_tokens([AddedToken("\u2581\u2581", normalized=False)])
    fields = tokenizer_metadata(own, "gemma4", model="gemma4", special={"unknown": 0})
    assert fields["tokenizer.ggml.tokens"][2] == "  "
    for text in ("a  a", "a   a", "    ", " a", "a \u2581\u2581 a"):
        assert build_tokenizer(fields)(text)["input_ids"] == own.encode(text).ids


def test_no_space_is_put_in_front_where_the_file_says_so(sentencepiece):
    own = Tokenizer.from_str(sentencepiece.to_str())
    own.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    own.decoder = decoders.Sequence(steps)
    tokenizer = build_tokenizer({**scored(own), "tokenizer.ggml.add_space_prefix": False})
    assert_same(own, tokenizer, TEXTS)


def test_gemma_4_has_merges_and_leaves_the_beginning_to_its_template(sentencepiece):
    own = Tokenizer.from_str(sentencepiece.to_str())
    own.normalizer = normalizers.Replace(" ", "\u2581")
    own.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    own.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    special = {"bos": 1, "eos": 2, "unknown": 0}
    fields = tokenizer_metadata(own, "gemma4", model="gemma4", special=special, add_bos_token=True)
    assert_same(own, build_tokenizer(fields), TEXTS)


@pytest.mark.parametrize(("scores", "ids"), [([-1.0, -2.0], [4, 3]), ([-2.0, -1.0], [1, 5])])
def test_the_better_score_is_merged_first(scores, ids):
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a", "b", "c", "ab", "bc"],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1, 1], "tokenizer.ggml.scores": [0.0] * 4 + scores,
        "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 2**32 - 1, "tokenizer.ggml.eos_token_id": 2**32 - 1,  # none, not 1 and 2
    }  # fmt: skip
    assert build_tokenizer(fields)("abc")["input_ids"] == ids


def test_scores_that_tell_nothing_are_refused(sentencepiece):
    fields = scored(sentencepiece)
    fields["tokenizer.ggml.scores"] = [-1000.0] * len(fields["tokenizer.ggml.tokens"])
    with pytest.raises(UnsupportedModelError, match="one score for all tokens"):
        build_tokenizer(fields)


@pytest.mark.parametrize("pre", ["default", "afmoe", "some-new-one", None])
def test_an_unknown_split_is_refused_by_name(trained, pre):
    fields = tokenizer_metadata(trained(), pre)
    if pre is None:
        del fields["tokenizer.ggml.pre"]
    with pytest.raises(UnsupportedModelError, match=pre or "does not say how") as refused:
        build_tokenizer(fields)
    assert "--config" in str(refused.value)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "none"])
def test_an_unknown_kind_is_refused_by_name(model):
    with pytest.raises(UnsupportedModelError, match=f"of the kind '{model}'"):
        build_tokenizer({"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["a"]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens is 'abc'"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "something other than texts"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries"),
        ({"tokenizer.ggml.merges": ["ab"]}, "holds 'ab', which is no pair"),
        ({"tokenizer.ggml.merges": ["nowhere tobefound"]}, "cannot be made a tokenizer"),
        ({"tokenizer.ggml.merges": None}, "has no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.bos_token_id": True}, "bos_token_id is True"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is 3"),
        ({"tokenizer.chat_templates": ["../x"]}, "holds the name '../x'"),
        ({"tokenizer.chat_templates": ["tool"]}, "has no tokenizer.chat_template.tool"),
    ],
)
def test_damaged_metadata_is_told_with_its_key(trained, change, told):
    fields = {**tokenizer_metadata(trained(), "gpt-2"), **change}
    with pytest.raises(CheckpointError, match=told):
        build_tokenizer({key: value for key, value in fields.items() if value is not None})


def test_named_templates_are_kept_and_one_that_does_not_compile_is_told_where_it_is_used(trained):
    fields = tokenizer_metadata(trained(), "gpt-2")
    named = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}"}
    both = build_tokenizer({**fields, **named, "tokenizer.chat_template": "hi"})
    assert both.chat_template == {"default": "hi", "tool_use": "{{ tools }}"}
    broken = build_tokenizer({**fields, "tokenizer.chat_template": "{% for %}"})
    assert broken("abc")["input_ids"]
    with pytest.raises(ValueError, match="the model's chat template refuses"):
        encode_messages(broken, [{"role": "user", "content": "hi"}])


def test_special_tokens_of_phi_3_eat_the_spaces_behind_them(sentencepiece):
    fields = {**scored(sentencepiece), "general.architecture": "phimoe"}
    fields["tokenizer.ggml.token_type"][sentencepiece.token_to_id("<think>")] = int(KINDS.CONTROL)
    tokenizer = build_tokenizer(fields)
    assert tokenizer("<think>  a")["input_ids"] == tokenizer("<think>a")["input_ids"]
    assert tokenizer("<s> a")["input_ids"] != tokenizer("<s>a")["input_ids"]
