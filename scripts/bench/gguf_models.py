"""GGUF files to measure, written once: a checkpoint's in llama.cpp's types, random ones, and values in safetensors.

Random files have the tensors of a Qwen3 mixture of experts, in blocks with random codes and small scales: of use for
times alone. Their routers are random too, so that every expert is as likely as any other. What a layer adds to the
stream is small beside it, as in a trained model: otherwise two experts that are nearly as likely, and one bit of
difference in a norm, make other logits of the same model.
"""

import json
import math
import shutil
import subprocess
from pathlib import Path

FILE_TYPES = {"q8_0": 7, "q4_k_m": 15}  # llama.cpp's numbers
FORMAT = 2  # raise it when random files of an older writer must not be used again
SCALES = {"Q4_K": {0: 1e-4, 2: 7.5e-4}, "Q6_K": {208: 1.6e-5}, "Q8_0": {0: 3e-4}}  # float16 in a block: byte, value
TIMES = {"token_embd": 512, "ffn_down": 1 / 16, "attn_output": 1 / 16}  # of a tensor's scales
WIDE = {"hidden_size": 2048, "moe_intermediate_size": 1024, "num_experts": 8, "num_hidden_layers": 4}
LARGE = {**WIDE, "num_experts": 32, "num_hidden_layers": 20}
_QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


def quantized(file: Path, kind: str, llama_python: str, threads: int) -> Path:
    """Return a GGUF file in another type, made by llama.cpp now unless it lies there from an earlier call.

    Args:
        file: in F16.
        kind: of FILE_TYPES, or "f16".
        llama_python: a Python that has llama-cpp-python.
        threads: that it takes.
    """
    target = file.with_name(f"{file.name.removesuffix('.f16.gguf')}.{kind}.gguf")
    if not target.is_file():
        partial = target.with_suffix(".partial")
        command = [llama_python, "-c", _QUANTIZE, str(file), str(partial), str(FILE_TYPES[kind]), str(threads)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"llama.cpp cannot write {target}: {made.stderr.strip()[-300:]}")
        partial.rename(target)
    return target


def random_gguf(work: Path, name: str, sizes: dict, kind: str, tokenizer_of: Path) -> Path:
    """Return a random model's GGUF file, written now unless it lies there from an earlier call.

    Args:
        work: folder of the file.
        name: of the model.
        sizes: fields of the config.
        kind: "q8_0", or "q4_k_m" (Q4_K, and Q6_K where llama.cpp's mix has it).
        tokenizer_of: a checkpoint's folder; the model has its vocabulary.
    """
    target = work / f"random{FORMAT}-{name}.{kind}.gguf"
    if target.is_file():
        return target
    import gguf
    import numpy as np
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from moeflow.convert.gguf_tokenizer import write_tokenizer
    from moeflow.hf.experts_interface import expert_parameters
    from moeflow.hf.gguf.architectures import find_architecture
    from moeflow.hf.gguf.feeding import feed

    vocabulary = json.loads((tokenizer_of / "config.json").read_text())["vocab_size"]
    config = Qwen3MoeConfig(
        vocab_size=vocabulary, intermediate_size=sizes["moe_intermediate_size"], num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, num_experts_per_tok=2, norm_topk_prob=True, mlp_only_layers=[],
        max_position_embeddings=4096, **sizes,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Qwen3MoeForCausalLM(config).state_dict().items()}
        experts = expert_parameters(Qwen3MoeForCausalLM(config))
    known, rng = find_architecture("qwen3moe"), np.random.default_rng(0)
    partial = target.with_suffix(".partial")
    work.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, known.name, use_temp_file=True)
    for key, value in known.metadata(config).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    write_tokenizer(writer, AutoTokenizer.from_pretrained(tokenizer_of), vocabulary)
    for parameter, fed in feed(known, config, list(shapes), _All()).items():
        shape = shapes[parameter]
        if parameter in experts:
            shape = (shape[0], shape[1] // len(fed.tensors), shape[2])
        for tensor in fed.tensors:
            if len(shape) == 1:
                writer.add_tensor(tensor, np.ones(shape, np.float32))
            elif "ffn_gate_inp" in tensor:
                writer.add_tensor(tensor, rng.normal(size=shape).astype(np.float32) / math.sqrt(shape[1]))
            else:
                is_six = any(part in tensor for part in ("ffn_down", "attn_v", "output.weight"))
                block = "Q8_0" if kind == "q8_0" else "Q6_K" if is_six else "Q4_K"
                times = next((times for part, times in TIMES.items() if part in tensor), 1)
                blocks = _blocks(block, shape, times, rng)
                writer.add_tensor(tensor, blocks, raw_dtype=gguf.GGMLQuantizationType[block])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


class _All(set):
    """Holds whatever is asked for, and lists nothing."""

    def __contains__(self, name: object) -> bool:
        return "{" not in str(name) and ".0.weight" not in str(name)  # stacked experts


def _blocks(kind: str, shape: tuple[int, ...], times: float, rng):
    import gguf
    import numpy as np

    values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, num_bytes), dtype=np.uint8)
    for place, scale in SCALES[kind].items():
        blocks[..., place : place + 2] = np.array([scale * times], "<f2").view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def dense_bytes(file, *, of_a_step: bool = False) -> int:
    """Return the bytes of a GGUF file's dense tensors.

    Args:
        file: a `GgufFile`.
        of_a_step: only those that a decode step reads whole: an embedding that is no head is left out.
    """
    left_out = "token_embd.weight" if of_a_step and "output.weight" in file.tensors else ""
    return sum(entry.num_bytes for name, entry in file.tensors.items() if "_exps." not in name and name != left_out)


def float_folder(file: Path, work: Path) -> Path:
    """Return a folder of safetensors in float32 of the values that gguf.quants gives, by the rules of moeflow.

    Args:
        file: a GGUF file.
        work: folder of the folder; written now unless it lies there from an earlier call.
    """
    target = work / f"{file.stem}-values"
    if target.is_dir():
        return target
    import gguf
    import torch

    from moeflow.hf.experts_interface import expert_parameters
    from moeflow.hf.gguf.architectures import find_architecture
    from moeflow.hf.gguf.feeding import feed
    from moeflow.hf.gguf.values import read_bytes
    from moeflow.hf.model_folder import ModelFolder

    folder = ModelFolder(file)
    folder.config.dtype = torch.float32
    empty, held = folder.empty_model(), folder.gguf
    experts = expert_parameters(empty)
    fed = feed(find_architecture(held.metadata["general.architecture"]), folder.config, list(empty.state_dict()),
               held.tensors)  # fmt: skip

    def values(name: str) -> torch.Tensor:
        entry = held.tensors[name]
        raw = read_bytes(held, name).numpy()
        found = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[entry.dtype])
        return torch.from_numpy(found).float().view(entry.shape)

    state = {}
    for name, feeding in fed.items():
        parts = [values(tensor) for tensor in feeding.tensors]
        if name not in experts:
            state[name] = feeding.rule.change.read(parts, folder.config)
        else:
            state[name] = torch.stack(parts, 2).flatten(1, 2) if feeding.rule.interleaves else torch.cat(parts, 1)
    empty.load_state_dict(state, strict=False, assign=True)
    empty.tie_weights()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    empty.save_pretrained(partial, max_shard_size="500MB")
    for beside in folder.path.iterdir():
        if not (partial / beside.name).exists() and beside.name not in ("gguf.json",) and beside.is_file():
            shutil.copy(beside, partial)
    partial.rename(target)
    return target
