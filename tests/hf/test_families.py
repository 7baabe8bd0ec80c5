"""Every family transformers decorates, built tiny, saved, and run out of a budget: by structure, not by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.families import FAMILIES
from helpers.family_models import build_model, inputs
from moeflow import load_moe
from moeflow.hf import pretrained
from moeflow.loading.budget import ExpertsSize

NUM_FAMILIES = 40


def eager_model(family, folder):
    """What the user would have called: the auto class, or the family's own where there is none."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    except ValueError:
        model = family.model_class.from_pretrained(folder, experts_implementation="eager")
    pretrained.own_dense_weights(model)  # transformers' mapped weights change the last bits from run to run
    return model.eval()


def smallest_budget(model):
    """The minimum the error message would name."""
    sources = model.moeflow.store.layers
    return ExpertsSize.of([source.layout for source in sources], 2).min_bytes


def run(model, family):
    """Logits of a prefill and, where the family has a key-value cache, of two decode steps after it."""
    with torch.no_grad():
        output = model(**inputs(family))
        logits = [output.logits]
        past = getattr(output, "past_key_values", None)
        steps = past is not None and model.can_generate() and "decoder_input_ids" not in inputs(family)
        for token in (3, 5) if steps else ():
            ids = torch.full((output.logits.shape[0], 1), token)
            logits.append(model(input_ids=ids, past_key_values=past).logits)
        return torch.cat(logits, dim=1)


def test_the_table_is_large_enough():
    assert len(FAMILIES) >= NUM_FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family_equals_eager_and_keeps_its_bits_at_every_budget(name, tmp_path):
    torch.set_num_threads(1)
    family = FAMILIES[name]
    build_model(family).save_pretrained(tmp_path / "whole")
    build_model(family).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    eager = eager_model(family, tmp_path / "whole")
    expected = run(eager, family)

    with torch.no_grad():
        resident = load_moe(tmp_path / "whole", expert_memory="100%")
        scale = expected.abs().max()
        found = run(resident, family)
        assert (found - expected).abs().max() <= 1e-5 * scale
        assert type(resident) is type(eager)
        assert resident.moeflow.stats()["prefill"]["misses"] > 0

        for policy in ("lfru", "lru"):
            budget = smallest_budget(resident)
            small = load_moe(tmp_path / "sharded", expert_memory=budget, policy=policy)
            for _ in range(2):
                assert torch.equal(run(small, family), found)
                small.moeflow.check_integrity()
            small.moeflow.close()
        resident.moeflow.close()


HALF = [(name, torch.bfloat16) for name in sorted(FAMILIES)] + [(name, torch.float16) for name in sorted(FAMILIES)[::8]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), HALF)
def test_family_keeps_its_bits_in_half_precision(name, dtype, tmp_path):
    torch.set_num_threads(1)
    family = FAMILIES[name]
    build_model(family, dtype=dtype).save_pretrained(tmp_path / "model")
    resident = load_moe(tmp_path / "model", expert_memory="100%")
    small = load_moe(tmp_path / "model", expert_memory=smallest_budget(resident))
    assert resident.dtype == dtype
    assert torch.equal(run(small, family), run(resident, family))
    resident.moeflow.close()
    small.moeflow.close()
