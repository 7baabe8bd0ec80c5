"""Write a Mixtral checkpoint as a GGUF file, so that llama.cpp can be measured on the same weights.

Streams tensor by tensor: memory stays near one layer's largest stack of experts. Knows nothing of benchmarks or torch.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from moeflow.atomic_file import atomic_file
from moeflow.checkpoint.headers import Checkpoint, open_checkpoint

FORMAT = 2  # raise it when files of an older exporter must not be used again
# GGUF name -> checkpoint name, of the tensors that exist once a layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERT_NAMES = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}
EXPERT_FORMATS = ("f16", "q8_0", "q4_0")
KEPT_IN_F32 = ("_norm", "ffn_gate_inp")  # as in llama.cpp's own converter


class ExportError(ValueError):
    """The checkpoint cannot be written as a GGUF file llama.cpp would read."""


def export_gguf(checkpoint: Path, work: Path, pre: str = "smollm", experts: str = "f16") -> Path:
    """Return the checkpoint's GGUF in `work`, made now unless it lies there from an earlier call.

    Args:
        checkpoint: folder of a Mixtral checkpoint with a byte-level BPE tokenizer.json.
        work: folder for GGUF files; each is named by a hash of its source and appears whole.
        pre: llama.cpp's name of the tokenizer's pre-tokenizer.
        experts: format of the experts' weights, of `EXPERT_FORMATS`; everything else is f16.

    Raises:
        ExportError: another architecture or tokenizer, a missing tensor, or a value that f16 cannot hold.
        OSError: `work` cannot be made.
        MoeflowError: the file cannot be written.
    """
    source = open_checkpoint(checkpoint)
    config = json.loads((source.folder / "config.json").read_text())
    if config.get("model_type") != "mixtral":
        raise ExportError(f"{checkpoint} is a {config.get('model_type')} checkpoint; the export knows mixtral")
    target = Path(work) / f"{Path(checkpoint).resolve().name}-{_fingerprint(source, pre)}.{experts}.gguf"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as arriving:  # on the disk too: what waits stays in the page cache
        _write(source, config, pre, arriving, experts)
    return target


def permute_for_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection from halves (transformers) to pairs (llama.cpp) within each head."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_tensor(source: Checkpoint, name: str) -> np.ndarray:
    """Read one tensor of a checkpoint as float32."""
    entry = source.tensors.get(name)
    if entry is None:
        raise ExportError(f"{source.folder} lacks {name}; is it a Mixtral checkpoint with an expert per tensor?")
    raw_dtype = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}.get(entry.dtype)
    if raw_dtype is None:
        raise ExportError(f"{name} is {entry.dtype}; the export knows BF16, F16 and F32")
    raw = np.fromfile(
        source.files[entry.file], np.dtype(raw_dtype), entry.num_bytes // int(raw_dtype[-1]), offset=entry.begin
    )
    values = (raw.astype("<u4") << 16).view("<f4") if entry.dtype == "BF16" else raw.astype("<f4")
    return values.reshape(entry.shape)


def _fingerprint(source: Checkpoint, pre: str) -> str:
    """Hash the inputs of the file; of the shards, name, size and time stand for their content."""
    digest = hashlib.sha256(f"{FORMAT} {pre}".encode())
    for file in source.files:
        status = file.stat()
        digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    for name in ("config.json", "tokenizer.json"):
        digest.update((source.folder / name).read_bytes())
    return digest.hexdigest()[:12]


def _write(source: Checkpoint, config: dict, pre: str, path: Path, experts: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _add_config(writer, config)
        _add_tokenizer(writer, json.loads((source.folder / "tokenizer.json").read_text()), config, pre)
        plan = list(_plan(source, config))
        for name, shape, dtype, _ in plan:
            if kind := _quantized(name, experts):
                rows = gguf.quant_shape_to_byte_shape(shape, kind)
                writer.add_tensor_info(name, rows, np.dtype(np.uint8), int(np.prod(rows)), raw_dtype=kind)
            else:
                writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape, dtype, build in plan:
            with np.errstate(over="ignore"):
                values = build().astype(dtype)
            if not np.isfinite(values).all():
                raise ExportError(f"{name} has values that {dtype} cannot hold")
            assert values.shape == shape, f"{name} became {values.shape}, announced as {shape}"
            if kind := _quantized(name, experts):
                values = gguf.quantize(values.astype(np.float32), kind)
            writer.write_tensor_data(values)
    finally:
        writer.close()


def _quantized(name: str, experts: str) -> "gguf.GGMLQuantizationType | None":
    """Return the quantised type of a tensor; None where it is of floats."""
    is_experts = name.removesuffix(".weight").endswith("_exps")
    return gguf.GGMLQuantizationType[experts.upper()] if is_experts and experts != "f16" else None


def _add_config(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 1e6), "rope_type": "default"}
    if rope.get("rope_type", "default") != "default" or config.get("sliding_window"):
        raise ExportError("scaled rope and sliding windows are not written by this export")
    writer.add_name("moeflow benchmark")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, config: dict, pre: str) -> None:
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"tokenizer.json holds a {model.get('type')} model; the export knows byte-level BPE")
    words = {number: word for word, number in model["vocab"].items()}
    special = {added["id"]: added["special"] for added in tokenizer.get("added_tokens", [])}
    words.update({added["id"]: added["content"] for added in tokenizer.get("added_tokens", [])})
    tokens, types = [], []
    for number in range(config["vocab_size"]):
        if number not in words:
            types.append(gguf.TokenType.UNUSED)
        elif number in special:
            types.append(gguf.TokenType.CONTROL if special[number] else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
        tokens.append(words.get(number, f"[PAD{number}]"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if merges:  # an empty array has no element type to write
        writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if isinstance(config.get(name), int):
            add(config[name])


def _plan(source: Checkpoint, config: dict) -> Iterator[tuple]:
    """Yield (GGUF name, shape, dtype, function that builds the values) for every tensor, in file order."""

    def plain(target: str, name: str, num_heads: int = 0):
        entry = source.tensors.get(name)
        if entry is None:
            raise ExportError(f"{source.folder} lacks {name}; is it a Mixtral checkpoint?")
        dtype = np.dtype(np.float32 if target.removesuffix(".weight").endswith(KEPT_IN_F32) else np.float16)

        def build():
            values = read_tensor(source, name)
            return permute_for_rope(values, num_heads) if num_heads else values

        return target, entry.shape, dtype, build

    def stacked(target: str, names: list[str]):
        first = source.tensors.get(names[0])
        if first is None:
            raise ExportError(f"{source.folder} lacks {names[0]}; the export wants an expert per tensor")
        shape = (len(names), *first.shape)
        return (
            target,
            shape,
            np.dtype(np.float16),
            lambda: np.stack([read_tensor(source, n).astype("<f2") for n in names]),
        )

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    yield plain("token_embd.weight", "model.embed_tokens.weight")
    for layer in range(config["num_hidden_layers"]):
        for target, name in LAYER_NAMES.items():
            yield plain(f"blk.{layer}.{target}.weight", f"model.layers.{layer}.{name}.weight", heads.get(target, 0))
        for target, name in EXPERT_NAMES.items():
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            names = [f"{prefix}.{expert}.{name}.weight" for expert in range(config["num_local_experts"])]
            yield stacked(f"blk.{layer}.{target}.weight", names)
    yield plain("output_norm.weight", "model.norm.weight")
    if not config.get("tie_word_embeddings"):
        yield plain("output.weight", "lm_head.weight")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pre", default="smollm", help="llama.cpp's name of the pre-tokenizer (default: smollm)")
    parser.add_argument("--experts", default="f16", choices=EXPERT_FORMATS, help="format of the experts (default: f16)")
    args = parser.parse_args(argv)
    print(export_gguf(args.checkpoint, args.work, args.pre, args.experts))


if __name__ == "__main__":
    main()
