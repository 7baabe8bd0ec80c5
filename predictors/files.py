"""Files of trained predictors: safetensors with a card of the training, refused for any other model."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from moeflow.atomic_file import NO_CHECKSUM, is_sealed, seal, write_atomically
from moeflow.core import align_up
from moeflow.errors import PredictorError
from moeflow.predictors.markov import Markov
from moeflow.predictors.path.net import PathNet, PathShape
from moeflow.predictors.path.predictor import PathPredictor
from moeflow.predictors.popularity import Popularity
from moeflow.predictors.protocol import Predictor
from moeflow.predictors.sequence.net import SequenceNet, SequenceShape
from moeflow.predictors.sequence.predictor import SequencePredictor
from moeflow.predictors.sequence.token_table import TokenTable

FORMAT, VERSION = "moeflow-predictor", 1
_MAX_SIZE = 1 << 24
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PredictorCard:
    """Card of a predictor in its file.

    Args:
        kind: a name in KINDS.
        fingerprint: of the model.
        num_layers: L.
        num_experts: E.
        top_k: K.
        seed: of its training.
        trained_on: free-form facts: the trace, its tokens, which sequences were held out.
        shape: sizes, by the kind's own names.
    """

    kind: str
    fingerprint: str
    num_layers: int
    num_experts: int
    top_k: int
    seed: int = 0
    trained_on: dict = field(default_factory=dict)
    shape: dict = field(default_factory=dict)


def _sequence_arrays(predictor: SequencePredictor) -> tuple[Arrays, dict]:
    table = predictor.table
    return {
        **predictor.arrays,
        "table.known_ids": table.known_ids.astype(np.int32),
        "table.num_seen": np.round(table.num_seen).astype(np.uint16),
        "table.counts": np.round(table.counts).astype(np.uint16),
        "table.popularity": table.popularity.astype(np.float32),
    }, vars(predictor.shape)


def _load_sequence(arrays: Arrays, card: PredictorCard) -> SequencePredictor:
    shape = SequenceShape(**card.shape)
    known, flat = shape.num_known_tokens, (shape.num_layers, shape.num_experts)
    table_shapes = {"known_ids": (known,), "num_seen": (known + 1,), "counts": (known + 1, *flat), "popularity": flat}
    table = {name: arrays.pop(f"table.{name}") for name in table_shapes}
    _require_shapes(table, table_shapes)
    with torch.device("meta"):
        net = SequenceNet(shape, table["popularity"])
    _require_shapes(arrays, {name: tuple(value.shape) for name, value in net.state_dict().items()})
    return SequencePredictor(shape, TokenTable(**table), arrays)


def _path_arrays(predictor: PathPredictor) -> tuple[Arrays, dict]:
    return {name: value.numpy() for name, value in predictor.net.state_dict().items()}, vars(predictor.net.shape)


def _load_path(arrays: Arrays, card: PredictorCard) -> PathPredictor:
    with torch.device("meta"):
        net = PathNet(PathShape(**card.shape))
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, assign=True)
    return PathPredictor(net)


def _popularity_arrays(predictor: Popularity) -> tuple[Arrays, dict]:
    assert predictor.popularity is not None, "counts of training"
    return {"popularity": predictor.popularity}, {}


def _load_popularity(arrays: Arrays, card: PredictorCard) -> Popularity:
    _require_shapes(arrays, {"popularity": (card.num_layers, card.num_experts)})
    return Popularity(card.num_layers, card.num_experts, arrays["popularity"])


def _markov_arrays(predictor: Markov) -> tuple[Arrays, dict]:
    return {name: getattr(predictor, name) for name in ("by_layer", "by_token", "popularity", "num_steps")}, {}


def _load_markov(arrays: Arrays, card: PredictorCard) -> Markov:
    markov = Markov(card.num_layers, card.num_experts, learn=False)
    _require_shapes(arrays, {name: array.shape for name, array in _markov_arrays(markov)[0].items()})
    vars(markov).update(arrays)
    markov.begin(1)
    return markov


def _require_shapes(arrays: Arrays, shapes: dict[str, tuple[int, ...]]) -> None:
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes:
        name = next(name for name in sorted({*found, *shapes}) if found.get(name) != shapes.get(name))
        raise ValueError(f"{name} is {found.get(name)} and should be {shapes.get(name)}")


# kind -> the function that takes arrays and sizes out of a predictor, and the one that builds a predictor of them
KINDS: dict[str, tuple[Callable[..., tuple[Arrays, dict]], Callable[[Arrays, PredictorCard], Predictor]]] = {
    "sequence": (_sequence_arrays, _load_sequence),
    "path": (_path_arrays, _load_path),
    "popularity": (_popularity_arrays, _load_popularity),
    "markov": (_markov_arrays, _load_markov),
}


def save_predictor(
    predictor: Predictor,
    path: str | Path,
    *,
    fingerprint: str,
    top_k: int,
    seed: int = 0,
    trained_on: dict | None = None,
) -> PredictorCard:
    """Write a predictor's file, whole or not at all.

    Raises:
        PredictorError: this kind has no file format, or the file cannot be written.
    """
    if predictor.name not in KINDS:
        raise PredictorError(f"a predictor {predictor.name!r} cannot be saved. Allowed: {', '.join(KINDS)}.")
    arrays, shape = KINDS[predictor.name][0](predictor)
    card = PredictorCard(
        predictor.name,
        fingerprint,
        predictor.num_layers,
        predictor.num_experts,
        top_k,
        seed,
        trained_on or {},
        dict(shape),
    )
    metadata = {"card": json.dumps(asdict(card)), "crc32": NO_CHECKSUM, "format": FORMAT, "version": str(VERSION)}
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
    write_atomically(path, seal(_in_order(content, metadata)), PredictorError)
    return card


def _in_order(content: bytes, metadata: dict[str, str]) -> bytes:
    """Put the metadata in its order: safetensors writes them in another each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8 : 8 + length]), "__metadata__": metadata}, separators=(",", ":"))
    text = header.encode()
    text = text.ljust(align_up(len(text), 8))
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def load_predictor(
    path: str | Path,
    *,
    fingerprint: str | None = None,
    num_layers: int | None = None,
    num_experts: int | None = None,
) -> tuple[Predictor, PredictorCard]:
    """Read a predictor's file.

    Args:
        path: the file.
        fingerprint: of the model it must be for; any when None.
        num_layers: that it must have; any when None.
        num_experts: that it must have; any when None.

    Raises:
        PredictorError: the file is missing, truncated, corrupt, no predictor's, or another model's.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            card = _read_card(path, metadata)
            if "crc32" in metadata and not is_sealed(Path(path).read_bytes()):
                raise PredictorError(
                    f"{path} is damaged: its checksum does not agree. Copy it again, or train it anew: moeflow "
                    "predictor train."
                )
            _require(path, card, fingerprint, num_layers, num_experts)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PredictorError(
            f"{path} cannot be read as a predictor: {error}. Train one: moeflow predictor train."
        ) from error
    try:
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds numbers that are not finite")
        predictor = KINDS[card.kind][1](arrays, card)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise PredictorError(f"{path} is damaged: its arrays are no {card.kind} predictor's ({error}).") from error
    found = (predictor.num_layers, predictor.num_experts)
    if found != (card.num_layers, card.num_experts):
        raise PredictorError(
            f"{path} is damaged: it says {card.num_layers} layers of {card.num_experts} experts and holds "
            f"{found[0]} of {found[1]}."
        )
    return predictor, card


def _read_card(path: str | Path, metadata: dict) -> PredictorCard:
    if metadata.get("format") != FORMAT:
        raise PredictorError(f"{path} is no predictor's file. Train one: moeflow predictor train.")
    if metadata.get("version") != str(VERSION):
        raise PredictorError(f"{path} has version {metadata.get('version')!r}, and this moeflow reads {VERSION}.")
    try:
        card = PredictorCard(**json.loads(metadata["card"]))
        _check_card(card)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PredictorError(f"{path} is damaged: its card cannot be read ({error}).") from error
    if card.kind not in KINDS:
        raise PredictorError(f"{path} holds a predictor {card.kind!r}. Allowed: {', '.join(KINDS)}.")
    return card


def _check_card(card: PredictorCard) -> None:
    """Refuse what no card holds; ValueError names it."""
    sizes = {name: getattr(card, name) for name in ("num_layers", "num_experts", "top_k")}
    sizes |= {f"shape of {name}": value for name, value in dict(card.shape).items() if not isinstance(value, float)}
    for name, value in sizes.items():
        if type(value) is not int or not 0 <= value < _MAX_SIZE:
            raise ValueError(f"{name} is {value!r}")
    if not isinstance(card.trained_on, dict) or type(card.trained_on.get("hold_out", 2)) is not int:
        raise ValueError(f"trained_on is {card.trained_on!r}")


def _require(
    path: str | Path,
    card: PredictorCard,
    fingerprint: str | None,
    num_layers: int | None,
    num_experts: int | None,
) -> None:
    wanted = {"model": fingerprint, "layers": num_layers, "experts a layer": num_experts}
    found = {"model": card.fingerprint, "layers": card.num_layers, "experts a layer": card.num_experts}
    for name, value in wanted.items():
        if value is not None and value != found[name]:
            raise PredictorError(
                f"{path} was trained for {name} {found[name]}, and {name} {value} is wanted here. "
                "Train one on a trace of this model: moeflow predictor train."
            )
