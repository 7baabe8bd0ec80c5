"""Latent, linear and windowed attention in GGUF: what is written is read back, and what cannot be said is refused."""

import pytest
import torch
import transformers

from helpers.hybrid_gguf import MODELS, read_file, read_parameters, tiny_model, write_file
from moeflow.hf.gguf.architectures import architecture_of, find_architecture

TOKENS = torch.arange(16)[None] * 7 % 256


def as_model(config: dict) -> transformers.PreTrainedModel:
    """Return a model of a config's fields, as AutoModel makes one."""
    config = {**config, "attn_implementation": "eager"}
    model_class = getattr(transformers, config.pop("architectures")[0])
    return model_class(transformers.AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_model_written_and_read_is_the_same_model(name, tmp_path):
    model = tiny_model(name, **({"num_hidden_layers": 3} if name == "deepseek-v2-lite" else {}))
    architecture = find_architecture(MODELS[name][0])
    assert architecture_of(model.config) is architecture
    write_file(model, architecture, tmp_path / "model.gguf")

    metadata, tensors = read_file(tmp_path / "model.gguf")
    config = architecture.config(metadata, {name: lambda: torch.empty(0) for name in tensors})
    assert config["model_type"] == model.config.model_type
    read = as_model(config)
    assert read.state_dict().keys() == model.state_dict().keys()
    parameters = read_parameters(read, architecture, tensors)
    for parameter_name, values in parameters.items():
        expected = model.state_dict()[parameter_name]
        if parameter_name.endswith("A_log"):  # the logarithm of an exponential
            torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(values, expected), parameter_name
    read.load_state_dict(parameters, strict=not model.config.tie_word_embeddings)
    torch.testing.assert_close(read.eval()(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
