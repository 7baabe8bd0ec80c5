"""Checkpoints with layers of multi-token prediction, as DeepSeek-V3's has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.families import FAMILIES
from helpers.family_models import build_model

FAMILY = "deepseek_v3"


def with_mtp(
    folder: Path,
    monkeypatch,
    num_layers: int = 1,
    *,
    family: str = FAMILY,
    model: transformers.PreTrainedModel | None = None,
) -> Path:
    """Write a model whose last layer is there so many times more, each to predict one more token.

    Args:
        folder: to write; the layers' weights lie in a shard of their own.
        monkeypatch: teaches transformers the numbers of these layers, where it has the real checkpoint's.
        num_layers: of them.
        family: of a tiny model at random.
        model: in its place.
    """
    model = build_model(FAMILIES[family]) if model is None else model
    model.config.num_mtp_layers = num_layers
    model.save_pretrained(folder)
    weights, size = load_file(folder / "model.safetensors"), model.config.hidden_size
    last = model.config.num_hidden_layers - 1
    own: dict[str, torch.Tensor] = {}
    patterns = []
    for number in range(last + 1, last + 1 + num_layers):
        prefix = f"model.layers.{number}."
        patterns.append(prefix.replace(".", r"\.") + ".*")
        own |= {prefix + name.split(".", 3)[3]: one for name, one in weights.items() if f"model.layers.{last}." in name}
        own |= {f"{prefix}{name}.weight": torch.ones(size) for name in ("enorm", "hnorm", "shared_head.norm")}
        own[f"{prefix}eh_proj.weight"] = torch.cat([torch.eye(size), torch.eye(size) / 4], 1)
    (folder / "model.safetensors").unlink()
    for name, held in ("model-1.safetensors", weights), ("model-2.safetensors", own):
        save_file({key: one.clone() for key, one in held.items()}, folder / name, metadata={"format": "pt"})
    index = dict.fromkeys(weights, "model-1.safetensors") | dict.fromkeys(own, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", patterns)
    return folder


@torch.no_grad()
def chain_model() -> transformers.PreTrainedModel:
    """A model whose next token follows from the last one alone, so that a copy of its layer says what follows."""
    model = build_model(FAMILIES[FAMILY])
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.mul_(0.02)
        elif "norm" in name:
            parameter.fill_(1)
    embedding = model.model.embed_tokens.weight
    embedding.copy_(torch.nn.functional.normalize(torch.randn(embedding.shape, generator=_generator()), dim=1) * 8)
    following = torch.randperm(len(embedding), generator=_generator())
    model.lm_head.weight[following] = embedding.clone()
    return model


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)
