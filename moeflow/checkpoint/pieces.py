"""Piece tables: file and offset of one piece of every expert of a layer, from tensors that feed one parameter.

Per-expert tensors and stacked ones become the same thing, a file and an offset for each expert.
"""

from array import array
from typing import Any, NamedTuple

from moeflow.checkpoint.headers import TensorEntry
from moeflow.checkpoint.layer_source import PieceTable
from moeflow.errors import CheckpointError


class Feeding(NamedTuple):
    """The checkpoint's tensors that feed one parameter of an experts module.

    Args:
        converter: transformers' rule, None where a tensor is the parameter as it is.
        groups: {source pattern: [(tensor name, entry)]}.
        place: of the parameter among the converter's targets.
    """

    converter: Any
    groups: dict[str, list[tuple[str, TensorEntry]]]
    place: int


def source_order(groups: dict[str, list], converter: Any) -> list[str]:
    """Return the source patterns in the order in which their tensors follow one another in the parameter."""
    return [pattern for pattern in converter.source_patterns if pattern in groups] if converter else list(groups)


def piece_tables(name: str, feeding: Feeding, num_experts: int) -> list[PieceTable]:
    """Build one table per source pattern, in the converter's order; stacked tensors are sliced along the expert.

    Args:
        name: of the parameter that is fed, for errors.
        feeding: the tensors.
        num_experts: how many the parameter has.

    Raises:
        CheckpointError: another number of experts, or experts that differ in shape. They may differ in dtype.
    """
    converter, groups, place = feeding
    splits_list = converter is not None and len(converter.target_patterns) > 1
    tables = []
    for pattern in source_order(groups, converter):
        members = groups[pattern]
        per_expert = "*" in pattern
        if splits_list and per_expert:  # one list of experts feeds several modules, in equal parts
            size = -(-len(members) // len(converter.target_patterns))
            members = members[place * size : (place + 1) * size]
        entries = [entry for _, entry in members]
        first = entries[0]
        if per_expert:
            if len(entries) != num_experts:
                raise CheckpointError(
                    f"{name} has {num_experts} experts, the checkpoint holds {len(entries)} tensors {pattern!r} for "
                    "it. Download the checkpoint again."
                )
            odd = next(((key, entry.shape) for key, entry in members if entry.shape != first.shape), None)
            if odd:
                raise CheckpointError(
                    f"{odd[0]} differs in shape from the other experts of {name}: {list(odd[1])}, theirs is "
                    f"{list(first.shape)}. The checkpoint is damaged: download it again."
                )
            tables.append(_of_each(entries))
        else:
            if len(entries) != 1 or not first.shape or first.shape[0] != num_experts:
                raise CheckpointError(
                    f"{name} has {num_experts} experts, the checkpoint's {members[0][0]} has shape "
                    f"{list(first.shape)}. Its config.json is of another model."
                )
            stride = first.num_bytes // num_experts
            begins = array("Q", range(first.begin, first.begin + first.num_bytes, stride))
            files = array("H", [first.file]) * num_experts
            tables.append(PieceTable(first.dtype, first.shape[1:], stride, files, begins))
    return tables


def _of_each(entries: list[TensorEntry]) -> PieceTable:
    """Return the table of tensors of one shape, one an expert."""
    files, begins = array("H", [entry.file for entry in entries]), array("Q", [entry.begin for entry in entries])
    largest, dtypes = max(entry.num_bytes for entry in entries), tuple(entry.dtype for entry in entries)
    first = entries[0]
    if len(set(dtypes)) == 1:
        return PieceTable(first.dtype, first.shape, largest, files, begins)
    sizes = array("Q", [entry.num_bytes for entry in entries])
    return PieceTable(first.dtype, first.shape, largest, files, begins, sizes, dtypes)
