"""A model that says what it is told to: after each word comes the one that its script has behind it."""

from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.small_models import tiny_mixtral

END = "<|end|>"
TEMPLATE = (
    "{# <think> <tool_call> #}{% if tools %}{{ tools }} {% endif %}"
    "{% for m in messages %}{{ m['content'] }} {{ m.get('tool_calls', '') }} {% endfor %}"
)


# A conversation about the weather: reasoning, a call, and what is said to the call's result.
SCRIPTS = {
    "think": ["<think>", "hm", "</think>", "Hello"],
    "call": ["Look:", "<tool_call>", '{"name":"weather","arguments":{"place":"Rome"}}', "</tool_call>"],
    "Rain.": ["Take", "an", "umbrella"],
}
PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PLACE}}
ARGUMENTS = {"place": "Rome"}


def scripted(scripts, chat_template=TEMPLATE, special=()):
    """A Mixtral and its tokenizer.

    Args:
        scripts: {last word of a prompt: words of the answer, none of them twice in all scripts}.
        chat_template: ends with the words of the last message.
        special: words that are special tokens.
    """
    import torch

    words = ["<unk>", END, *special]
    words += [word for begin, answer in scripts.items() for word in (begin, *answer) if word not in words]
    pieces = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        eos_token=END,
        unk_token="<unk>",
        additional_special_tokens=list(special),
        chat_template=chat_template,
    )
    size = 64
    assert len(words) <= size, "a word has a dimension of its own"
    model = tiny_mixtral(vocab_size=len(words), hidden_size=size, eos_token_id=1, max_position_embeddings=512)
    model.generation_config.eos_token_id = 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "down_proj" in name or "o_proj" in name:
                parameter.zero_()  # nothing but the last word's embedding reaches the head
        model.get_input_embeddings().weight.copy_(torch.eye(len(words), size))
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = 0.1  # after a word without script comes the end
        for begin, answer in scripts.items():
            said = [begin, *answer, END]
            for word, behind in pairwise(said):
                model.lm_head.weight[words.index(behind), words.index(word)] = 5
    return model, tokenizer
