"""A predictor's file comes back as it was written, and is refused wherever it is not what it should be."""

import json
import random

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from helpers.damage import damaged
from moeflow.errors import PredictorError
from moeflow.predictors.files import load_predictor, save_predictor
from moeflow.predictors.markov import Markov
from moeflow.predictors.path.training import train_path
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.recorded import RecordedLookahead
from moeflow.predictors.routes import Routes
from moeflow.predictors.sequence.training import train_sequence
from moeflow.predictors.training import TrainingOptions

L, E, K = 3, 8, 2
TINY = TrainingOptions(epochs=1, batch_size=4)


def routes():
    rng = np.random.default_rng(0)
    token_ids = [rng.integers(0, 9, 12).astype(np.int32) for _ in range(4)]
    experts = [rng.random((12, L, E)).argsort(-1)[:, :, :K].astype(np.uint8) for _ in token_ids]
    return Routes(token_ids, experts, None, E)


def trained(kind):
    if kind == "path":
        return train_path(routes(), TINY, num_rows=16, width=8, inner_width=8, num_heads=2)
    if kind == "sequence":
        return train_sequence(routes(), TINY, width=8, token_width=4, later_rank=4)
    return {"popularity": Popularity, "markov": Markov}[kind].train(routes())


@pytest.fixture
def file(tmp_path):
    save_predictor(trained("popularity"), tmp_path / "p", fingerprint="model-a", top_k=K)
    return tmp_path / "p"


def rewrite(file, change_metadata=None, change_arrays=None):
    """Write a file again with something changed."""
    with safe_open(file, framework="numpy") as opened:
        metadata, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    metadata.pop("crc32", None)  # as in files of an older moeflow
    if change_metadata:
        change_metadata(metadata)
    if change_arrays:
        change_arrays(arrays)
    save_file(arrays, file, metadata)


@pytest.mark.parametrize("kind", ["popularity", "markov", "path", "sequence"])
def test_a_saved_predictor_predicts_as_before(kind, tmp_path):
    predictor = trained(kind)
    written = save_predictor(
        predictor, tmp_path / "p", fingerprint="model-a", top_k=K, seed=3, trained_on={"trace": "t", "tokens": 48}
    )
    again, card = load_predictor(tmp_path / "p", fingerprint="model-a", num_layers=L, num_experts=E)
    assert card == written
    assert (card.kind, card.seed, card.trained_on["tokens"], card.top_k) == (kind, 3, 48, K)
    for one in (predictor, again):
        one.begin(2)
    for t in range(5):
        token_ids = np.array([t, t + 1])
        np.testing.assert_allclose(again.step(token_ids), predictor.step(token_ids), atol=1e-6)
        for layer in range(L):
            chosen = np.array([[0, 1], [t, 7]])
            one, other = again.observe(layer, chosen, None), predictor.observe(layer, chosen, None)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"fingerprint": "model-b"}, "model model-a, and model model-b is wanted"),
        ({"num_layers": 4}, "layers 3, and layers 4 is wanted"),
        ({"num_experts": 16}, "experts a layer 8, and experts a layer 16 is wanted"),
    ],
)
def test_another_models_predictor_is_refused(file, wanted, message):
    with pytest.raises(PredictorError, match=message):
        load_predictor(file, **wanted)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PredictorError, match="nowhere"):
        load_predictor(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 5, 60, -1])
def test_a_truncated_file_is_refused(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(PredictorError, match="cannot be read as a predictor"):
        load_predictor(file)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(PredictorError, match="cannot be read as a predictor"):
        load_predictor(tmp_path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(PredictorError, match="no predictor's file"):
        load_predictor(tmp_path / "model.safetensors")


def test_a_later_version_is_refused(file):
    rewrite(file, lambda metadata: metadata.update(version="2"))
    with pytest.raises(PredictorError, match=r"version '2'.*reads 1"):
        load_predictor(file)


@pytest.mark.parametrize("card", ["", "[]", "{", json.dumps({"kind": "popularity"}), json.dumps({"colour": "red"})])
def test_a_damaged_card_is_refused(file, card):
    rewrite(file, lambda metadata: metadata.update(card=card))
    with pytest.raises(PredictorError, match="damaged"):
        load_predictor(file)


def test_an_unknown_kind_is_refused(file):
    def change(metadata):
        metadata["card"] = json.dumps({**json.loads(metadata["card"]), "kind": "oracle"})

    rewrite(file, change)
    with pytest.raises(PredictorError, match=r"'oracle'.*Allowed: sequence"):
        load_predictor(file)


@pytest.mark.parametrize("kind", ["popularity", "markov", "path", "sequence"])
def test_a_file_without_one_of_its_arrays_is_refused(kind, tmp_path):
    save_predictor(trained(kind), tmp_path / "p", fingerprint="model-a", top_k=K)
    rewrite(tmp_path / "p", change_arrays=lambda arrays: arrays.pop(next(iter(arrays))))
    with pytest.raises(PredictorError, match="damaged"):
        load_predictor(tmp_path / "p")


@pytest.mark.parametrize("kind", ["markov", "path", "sequence"])
def test_a_file_whose_arrays_have_other_shapes_is_refused(kind, tmp_path):
    save_predictor(trained(kind), tmp_path / "p", fingerprint="model-a", top_k=K)
    for name in ("heads.weight", "outward.weight", "by_token"):

        def change(arrays, name=name):
            if name in arrays:
                arrays[name] = arrays[name][:, :-1].copy()

        rewrite(tmp_path / "p", change_arrays=change)
    with pytest.raises(PredictorError, match="damaged"):
        load_predictor(tmp_path / "p")


def test_arrays_that_are_not_numbers_are_refused(file):
    rewrite(file, change_arrays=lambda arrays: arrays["popularity"].fill(np.nan))
    with pytest.raises(PredictorError, match="damaged"):
        load_predictor(file)


def test_a_predictor_without_a_file_format_is_refused(tmp_path):
    with pytest.raises(PredictorError, match="'lookahead' cannot be saved"):
        save_predictor(RecordedLookahead(L, E, K, 1, 2), tmp_path / "p", fingerprint="model-a", top_k=K)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(PredictorError, match="cannot be written"):
        save_predictor(trained("popularity"), tmp_path / "no" / "p", fingerprint="model-a", top_k=K)
    (tmp_path / "p").mkdir()
    with pytest.raises(PredictorError, match="cannot be written"):
        save_predictor(trained("popularity"), tmp_path / "p", fingerprint="model-a", top_k=K)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("kind", ["popularity", "markov", "path", "sequence"])
@pytest.mark.parametrize("has_checksum", [True, False])
def test_a_damaged_file_is_refused_or_predicts_as_before(kind, has_checksum, tmp_path):
    file, said = tmp_path / "p", []
    save_predictor(trained(kind), file, fingerprint="model-a", top_k=K, trained_on={"hold_out": 5})
    if not has_checksum:
        rewrite(file)
    whole, rng = file.read_bytes(), random.Random(0)
    card, told = load_predictor(file)[1], []
    for number in range(301):
        if number:
            file.write_bytes(damaged(whole, rng, whole.index(b"}}") + 2))
        try:
            predictor, found = load_predictor(file)
        except PredictorError as error:
            told.append(str(error))
            continue
        predictor.begin(1)
        said.append(predictor.step(np.array([3])))
        if has_checksum:
            assert found == card
            np.testing.assert_array_equal(said[-1], said[0])
    assert len(told) > (250 if has_checksum else 100)
    assert all(text.startswith(str(file)) for text in told)


def test_a_predictor_is_written_with_the_same_bytes_each_time(tmp_path):
    for name in "ab":
        save_predictor(trained("markov"), tmp_path / name, fingerprint="model-a", top_k=K)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
