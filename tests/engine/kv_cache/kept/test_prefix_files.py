"""What is kept lives through a restart; files that are damaged or of another model are left out with a warning."""

import json
import logging

import pytest
import torch

from helpers.engine_requests import GREEDY, PREFIX, generated
from helpers.small_models import tiny_mixtral
from helpers.small_slots import TINY, TINY_POSITION, has_names, named_slot
from moeflow import load_moe
from moeflow.engine.engine import Engine
from moeflow.engine.kv_cache.kept import prefix_files
from moeflow.engine.kv_cache.kept.prefix_tree import PrefixTree
from moeflow.engine.kv_cache.layer_shape import LayerShape
from moeflow.engine.kv_cache.memory import KeyValueMemory
from moeflow.engine.kv_cache.slots import KeyValueSlot
from moeflow.errors import ClosedModelError, MoeflowError

TEXTS = [((3,), "abcdef"), ((3,), "abxy"), (None, "abcdefgh"), ((), "q")]
MODEL = "0123456789abcdef"


def kept_tree(texts=TEXTS):
    tree = PrefixTree()
    for scaling, text in texts:
        tree.keep(scaling, list(map(ord, text)), named_slot(scaling, list(map(ord, text))))
    return tree


def loaded(folder, fingerprint=MODEL, layout=TINY):
    tree = PrefixTree()
    for run in prefix_files.load(folder, fingerprint, layout, lambda num_bytes, num_tokens: True):
        tree.restore(run)
    tree.check_integrity(TINY_POSITION)
    return tree


def all_runs(tree):
    return [(run.scaling, run.before, run.tokens) for run in tree.runs()]


def test_a_tree_is_loaded_as_it_was_saved_in_its_order_of_use(tmp_path):
    tree = kept_tree()
    tree.longest((3,), list(map(ord, "abcdef")))
    assert prefix_files.save(tree, tmp_path / "new" / "folder", MODEL) == tree.num_tokens == 6 + 2 + 8 + 1
    assert (tmp_path / "new" / "folder" / MODEL).stat().st_mode & 0o77 == 0, "others read what was talked about"
    found = loaded(tmp_path / "new" / "folder")
    assert all_runs(found) == all_runs(tree)
    for scaling, text in TEXTS:
        tokens = list(map(ord, text))
        slot = KeyValueSlot.empty(TINY, len(text))
        found.copy(scaling, tokens, slot)
        assert has_names(slot, scaling, tokens)


def test_what_is_there_is_not_written_again_and_what_left_is_removed(tmp_path):
    tree = kept_tree()
    prefix_files.save(tree, tmp_path, MODEL)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / MODEL).glob("*.kept")}
    prefix_files.save(kept_tree([("other", "zz")]), tmp_path, "another model")
    tree.drop()
    tree.keep(None, list(map(ord, "new")), named_slot(None, list(map(ord, "new"))))
    prefix_files.save(tree, tmp_path, MODEL)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / MODEL).glob("*.kept")}
    assert len(before.keys() - after.keys()) == len(after.keys() - before.keys()) == 1
    assert all(after[name] == before[name] for name in before.keys() & after.keys())
    assert all_runs(loaded(tmp_path)) == all_runs(tree)
    assert len(list((tmp_path / "another model").glob("*.kept"))) == 1


def test_nothing_is_loaded_of_another_model_or_where_nothing_was_saved(tmp_path, caplog):
    prefix_files.save(kept_tree(), tmp_path, MODEL)
    assert loaded(tmp_path, "fedcba9876543210").num_tokens == 0
    assert loaded(tmp_path / "nowhere").num_tokens == 0
    assert not caplog.records
    (tmp_path / MODEL).rename(tmp_path / "renamed")
    assert loaded(tmp_path, "renamed").num_tokens == 0
    assert "of another model" in caplog.text


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone", "another"])
def test_a_damaged_file_is_left_out_with_what_follows_it_and_all_else_is_loaded(tmp_path, caplog, damage):
    prefix_files.save(kept_tree(), tmp_path, MODEL)
    index = json.loads((tmp_path / MODEL / "index.json").read_bytes())
    (row,) = [one for one in index["runs"] if one["scaling"] == [3] and not one["before"]]
    file = tmp_path / MODEL / row["file"]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    others = next(one for one in (tmp_path / MODEL).glob("*.kept") if one != file).read_bytes()
    cut = file.read_bytes()[:-5]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flipped": bytes(content), "cut": cut, "empty": b"", "another": others}[damage])
    with caplog.at_level(logging.WARNING):
        found = loaded(tmp_path)
    assert found.num_tokens == 8 + 1
    assert [row["file"] in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_index_is_not_used_and_the_next_save_mends_it(tmp_path, caplog, damage):
    prefix_files.save(kept_tree(), tmp_path, MODEL)
    index = tmp_path / MODEL / "index.json"
    content = index.read_bytes()
    index.write_bytes({"flipped": content.replace(b"97", b"98"), "cut": content[:-9], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert loaded(tmp_path).num_tokens == 0
    assert "index.json is damaged" in caplog.text
    prefix_files.save(kept_tree(), tmp_path, MODEL)
    assert loaded(tmp_path).num_tokens == 6 + 2 + 8 + 1


def test_keys_of_another_shape_or_dtype_are_not_used(tmp_path, caplog):
    prefix_files.save(kept_tree(), tmp_path, MODEL)
    for shape in (LayerShape((1, 1), (1, 1), torch.float32, TINY[0].device), TINY[0]._replace(key=(1, 2))):
        assert loaded(tmp_path, layout={0: shape}).num_tokens == 0
    assert loaded(tmp_path, layout={0: TINY[0], 1: TINY[0]}).num_tokens == 0
    assert "not used" in caplog.text


def test_as_much_is_loaded_as_there_is_room_for_the_last_used_first(tmp_path):
    texts = [(None, text * 20) for text in "abcd"]
    prefix_files.save(kept_tree(texts), tmp_path, MODEL)
    memory = KeyValueMemory(TINY, 50 * TINY_POSITION)
    assert memory.load(tmp_path, MODEL) == 40
    assert [run.tokens[0] for run in memory.kept.runs()] == [ord("d"), ord("c")]
    memory.check_integrity()
    memory.keeps = False
    memory.clear()
    assert memory.load(tmp_path, MODEL) == 0


def test_a_folder_that_cannot_be_made_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeflowError, match="cannot be written"):
        prefix_files.save(kept_tree(), tmp_path / "file", MODEL)


def test_an_engine_goes_on_with_a_conversation_after_a_restart(tmp_path, mixtral):
    prompt = [*PREFIX, 9, 8]
    with Engine(mixtral) as engine:
        first = engine.generate([prompt], GREEDY)[0].token_ids
        assert engine.save_kept(tmp_path) == len(prompt) + len(first) - 1
    with pytest.raises(ClosedModelError):  # it has nothing any more, and would remove what was saved
        engine.save_kept(tmp_path)
    second = [*prompt, *first, 5]
    with Engine(mixtral) as engine:
        assert engine.load_kept(str(tmp_path)) == len(prompt) + len(first) - 1
        (completion,) = engine.generate([second], GREEDY)
        assert completion.cached_tokens == len(second) - 2
        assert completion.token_ids == generated(mixtral, second)
    changed = tiny_mixtral()
    changed.load_state_dict(mixtral.state_dict())
    changed.config.architectures, changed.config.name_or_path = ["Other"], "elsewhere"
    with Engine(changed) as engine:
        assert engine.load_kept(tmp_path) == len(prompt) + len(first) - 1, "the same weights, the same model"
    changed.model.layers[1].self_attn.k_proj.weight.data += 0.01
    for other in (changed, tiny_mixtral().to(torch.bfloat16)):
        with Engine(other) as engine:
            assert engine.load_kept(tmp_path) == 0


def test_an_engine_on_experts_in_other_bits_or_other_files_begins_anew(tmp_path, mixtral_folder):
    options = {"predictor": None, "expert_memory": "100%", "device": "cpu"}
    for quantization, found in ((None, 0), (None, 20), ("int8", 0)):
        model = load_moe(mixtral_folder, quantization=quantization, **options)
        with model.moeflow, Engine(model) as engine:
            assert (engine.load_kept(tmp_path) > 0) == (found > 0)
            engine.generate([PREFIX], GREEDY)
            engine.save_kept(tmp_path)
