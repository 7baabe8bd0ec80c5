"""Small checkpoints in the layouts of published quantised ones, each beside a plain one of the same values.

The values are made here from the formats' descriptions, element by element, and share no code with moeflow.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

COMMON = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# Where the i-th of eight out features lies in an AWQ int32.
AWQ_PLACE = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def tiny_model(family: str, hidden: int = 64, intermediate: int = 96, dtype=torch.float32):
    """Build a random model of two layers and four experts (DeepSeek: one dense layer, one MoE layer)."""
    sizes = {**COMMON, "hidden_size": hidden}
    if family == "gpt_oss":
        config = transformers.GptOssConfig(
            **sizes, intermediate_size=intermediate, num_local_experts=4, head_dim=16, sliding_window=16
        )
    elif family == "mixtral":
        config = transformers.MixtralConfig(**sizes, intermediate_size=intermediate, num_local_experts=4)
    elif family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **sizes, intermediate_size=intermediate, moe_intermediate_size=intermediate, num_experts=4, head_dim=16
        )
    else:
        config = transformers.DeepseekV3Config(
            **{**sizes, "num_key_value_heads": 4}, intermediate_size=intermediate, moe_intermediate_size=intermediate,
            n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
            q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
        )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else None
    return model.to(dtype)


def write_checkpoint(folder: Path, tensors: dict, config: dict, shards: int = 3) -> None:
    """Write tensors round-robin over shards, so that the pieces of one matrix lie in different files."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    weight_map = {
        name: f"model-{number % shards + 1:05}-of-{shards:05}.safetensors" for number, name in enumerate(names)
    }
    for file in sorted(set(weight_map.values())):
        save_file({n: tensors[n].contiguous() for n in names if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def make(folder: Path, model, quantization: dict, quantise, is_quantised) -> tuple[Path, Path, dict]:
    """Write a quantised checkpoint and its plain twin.

    Args:
        folder: gets "native" and "plain".
        model: whose names and shapes are taken.
        quantization: the quantization_config.
        quantise: (name, weight) -> ({name: piece}, values the pieces stand for, float64).
        is_quantised: name -> bool.

    Returns:
        Both folders, and {name: values in float64} of what is quantised.
    """
    model.save_pretrained(folder / "source")
    source = load_file(folder / "source" / "model.safetensors")
    config = json.loads((folder / "source" / "config.json").read_text())
    native, plain, exact = {}, {}, {}
    for name, weight in source.items():
        if is_quantised(name):
            pieces, exact[name] = quantise(name, weight)
            native |= pieces
            plain[name] = exact[name].to(weight.dtype)
        else:
            native[name] = plain[name] = weight
    write_checkpoint(folder / "native", native, {**config, "quantization_config": quantization})
    write_checkpoint(folder / "plain", plain, config)
    return folder / "native", folder / "plain", exact


def is_linear(name: str) -> bool:
    """Tell whether quantising tools take this tensor: projections, not routers, norms, embeddings or the head."""
    return name.endswith(".weight") and any(
        part in name for part in ("_proj.", ".w1.", ".w2.", ".w3.", "q_a_proj", "kv_a_proj")
    )


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def _write_nibbles(codes: np.ndarray, word: np.ndarray, place: np.ndarray, num_words: int) -> np.ndarray:
    """Pack codes [R, C]: code c of a row goes to nibble place[c] of the row's word word[c]."""
    out = np.zeros((codes.shape[0], num_words), np.uint32)
    for column in range(codes.shape[1]):
        out[:, word[column]] |= codes[:, column].astype(np.uint32) << np.uint32(4 * place[column])
    return out


def _words(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int32))


def int4_quantiser(method: str, group_size: int, zero_offset: int = 0, g_idx: bool = True):
    """Return `quantise` of GPTQ or AWQ with random codes, scales and zero points."""

    def quantise(name, weight):
        rng, (num_rows, columns) = _generator(name), weight.shape
        size = columns if group_size == -1 else group_size
        groups = -(-columns // size)
        codes = rng.integers(0, 16, (num_rows, columns))
        stored_zeros = rng.integers(0, 16, (groups, num_rows))
        scales = rng.uniform(0.005, 0.03, (groups, num_rows)).astype(np.float16)
        group = np.arange(columns) // size
        values = (codes - (stored_zeros[group].T + zero_offset)) * scales[group].T.astype(np.float64)
        k, n, stem = np.arange(columns), np.arange(num_rows), name.removesuffix(".weight")
        if method == "gptq":
            qweight = _write_nibbles(codes, k // 8, k % 8, columns // 8).T
            qzeros = _write_nibbles(stored_zeros, n // 8, n % 8, num_rows // 8)
        else:
            qweight = _write_nibbles(codes.T, n // 8, AWQ_PLACE[n % 8], num_rows // 8)
            qzeros = _write_nibbles(stored_zeros, n // 8, AWQ_PLACE[n % 8], num_rows // 8)
        pieces = {
            f"{stem}.qweight": _words(qweight),
            f"{stem}.qzeros": _words(qzeros),
            f"{stem}.scales": torch.from_numpy(scales),
        }
        if method == "gptq" and g_idx:
            pieces[f"{stem}.g_idx"] = torch.from_numpy(group.astype(np.int32))
        return pieces, torch.from_numpy(values)

    return quantise


def fp8_quantiser(scale_dtype=torch.float32):
    """Return `quantise` of FP8 with 128 x 128 blocks."""

    def quantise(name, weight):
        rng, (rows, columns) = _generator(name), weight.shape
        codes = (weight / 0.2).to(torch.float8_e4m3fn)
        scales = torch.from_numpy(rng.uniform(0.1, 0.3, (-(-rows // 128), -(-columns // 128)))).to(scale_dtype)
        values = codes.double()
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                values[block] *= scales[row, column].double()
        return {name: codes, f"{name}_scale_inv": scales}, values

    return quantise


def mxfp4_quantiser(name, weight):
    """Quantise stacked gpt-oss experts [E, in, out] with random codes."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng, (experts, columns, rows) = _generator(name), weight.shape
    blocks = torch.from_numpy(rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(120, 124, (experts, rows, columns // 32)).astype(np.uint8))
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, values
