"""Copies of a small model's checkpoint whose experts were changed in one place."""

import copy

import torch


@torch.no_grad()
def save_changed(model, folder, change):
    """Save a copy of a model; `change` is called with the experts modules of its layers first."""
    changed = copy.deepcopy(model)
    change([layer.mlp.experts for layer in changed.model.layers])
    changed.save_pretrained(folder)
    return folder
