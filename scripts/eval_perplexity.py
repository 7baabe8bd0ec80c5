"""Perplexity of a model with its experts in weight formats, beside its own in bfloat16.

    python scripts/eval_perplexity.py --formats int8,int4-g64:hqq,int4-g64:rtn,int3-g64:hqq,int2-g64:hqq
    python scripts/eval_perplexity.py --folder OUT

Texts are WikiText-2 validation and the books validation of the shared data, cut into windows; the same windows for
every row, taken at equal distances over the whole text. Ratios carry their standard error over windows, paired. A
format is written FORMAT or FORMAT:METHOD (rtn, hqq; hqq where none is named); --folder adds a folder that `moeflow
quantize` wrote, read by `load_moe`. Nothing may be tuned on these texts.
"""

import argparse
import json
import lzma
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from moeflow.demo.model import default_demo_path
from moeflow.errors import ConfigError, MoeflowError
from moeflow.kernels.quantization.dequantize import dequantize
from moeflow.kernels.quantization.formats import WRITABLE, find_format
from moeflow.kernels.quantization.quantize import quantize

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "bfloat16"
TEXTS = {"wikitext2": "wikitext2/valid.txt", "books": "books/books_valid.txt.xz"}
_BOOK_END = "<|endoftext|>"
_BATCH_TOKENS = 2048
_METHODS = ("rtn", "hqq")  # those that need no calibration


def main(argv: list[str] | None = None) -> int:
    """Measure every row; the last line printed is one JSON object."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    begin = time.perf_counter()
    try:
        rows = measure(args)
    except (MoeflowError, OSError) as error:
        say(str(error))
        return 1
    if not args.json:
        print_table(rows, args)
    card = {
        "model": str(args.model),
        "tokens": args.tokens,
        "window": args.window,
        "compute_dtype": args.dtype,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    print(json.dumps({"card": card, "rows": rows}))
    return 0


def measure(args: argparse.Namespace) -> list[dict]:
    """Return a row of figures of the baseline, of each format and of each folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = {name: cut_windows(tokenizer, args.data / path, args) for name, path in TEXTS.items()}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    originals = expert_weights(model)
    with torch.no_grad():
        for weight in originals.values():  # whatever the checkpoint holds, the baseline is in bfloat16
            weight.copy_(weight.bfloat16())
    say(BASELINE)
    losses = {BASELINE: evaluate(model, windows)}
    rows = [row_of(BASELINE, losses, weight_bytes(originals, BASELINE), originals)]
    kept = {name: weight.to(torch.bfloat16, copy=True) for name, weight in originals.items()} if args.formats else {}
    for label in args.formats:
        name, method = split_label(label)
        begin = time.perf_counter()
        for key, weight in originals.items():
            replace_experts(weight, kept[key], name, method, key)
        say(f"{label} (quantised in {time.perf_counter() - begin:.0f} s)")
        losses[label] = evaluate(model, windows)
        rows.append(row_of(label, losses, weight_bytes(originals, name), originals))
    del model, kept
    for folder in args.folder:
        say(str(folder))
        loaded, label = load_folder(folder, args), f"folder {folder}"
        losses[label] = evaluate(loaded, windows)
        rows.append(row_of(label, losses, folder_bytes(loaded), originals))
        loaded.moeflow.close()
    return rows


def perplexity(model, windows: torch.Tensor) -> tuple[float, list[float]]:
    """Return the perplexity, and the loss of each window, in nats a token: it is exp of their mean.

    Args:
        model: any transformers causal language model.
        windows: [num_windows, length], token ids; each is predicted from its own beginning.
    """
    losses = []
    with torch.inference_mode():
        for batch in windows.split(max(_BATCH_TOKENS // windows.shape[1], 1)):
            predicted = model(input_ids=batch, use_cache=False).logits[:, :-1]
            for logits, ids in zip(predicted, batch[:, 1:], strict=True):
                losses.append(F.cross_entropy(logits.float(), ids).item())
    return math.exp(statistics.mean(losses)), losses


def evaluate(model, windows: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Return the losses of every text's windows."""
    found = {}
    for name, text_windows in windows.items():
        begin = time.perf_counter()
        value, found[name] = perplexity(model, text_windows)
        say(f"  {name} {value:.3f} ({time.perf_counter() - begin:.0f} s)")
    return found


def cut_windows(tokenizer, path: Path, args: argparse.Namespace) -> torch.Tensor:
    """Return windows at equal distances over a text, [num_windows, window], token ids."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    text = raw.decode("utf-8").replace(_BOOK_END, "")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    wanted, available = max(args.tokens // args.window, 1), len(ids) // args.window
    places = [i * available // wanted for i in range(wanted)] if wanted < available else range(available)
    return torch.tensor([ids[place * args.window : (place + 1) * args.window] for place in places])


def expert_weights(model) -> dict[str, torch.Tensor]:
    """Return the stacked matrices of the routed experts by name, [E, N, K], or [E, K, N] where transposed."""
    found = {}
    for name, module in model.named_modules():
        for parameter in ("gate_up_proj", "up_proj", "down_proj"):
            weight = getattr(module, parameter, None)
            if isinstance(weight, torch.nn.Parameter) and weight.dim() == 3:
                found[f"{name}.{parameter}"] = weight.mT if getattr(module, "is_transposed", False) else weight
    if not found:
        raise ConfigError("this model has no stacked routed experts. Give a mixture-of-experts checkpoint.")
    return found


def replace_experts(target: torch.Tensor, weights: torch.Tensor, name: str, method: str, label: str) -> None:
    """Put the experts of one matrix into the model, rounded to a format."""
    spec = find_format(name)
    with torch.no_grad():
        for expert, weight in enumerate(weights):
            stored = quantize(weight, spec, method=method, name=f"expert {expert} of {label}")
            target[expert] = dequantize(stored, f"expert {expert} of {label}", spec, tuple(weight.shape))


def split_label(label: str) -> tuple[str, str]:
    """Return format and method of "int4-g64:hqq".

    Raises:
        ConfigError: one of them is unknown.
    """
    name, _, method = label.partition(":")
    spec, method = find_format(name), method or "hqq"
    if spec.kind != "float" and spec.name not in WRITABLE:
        raise ConfigError(f"experts cannot be quantised to {spec.name}. Allowed: {', '.join(WRITABLE)}.")
    if method not in _METHODS:
        raise ConfigError(f"method {method!r} of {label!r} is unknown. Allowed: {', '.join(_METHODS)}.")
    return spec.name, method


def weight_bytes(originals: dict[str, torch.Tensor], name: str) -> int:
    """Return the bytes of all experts' matrices in a format."""
    return sum(w.shape[0] * find_format(name).num_bytes((w.shape[1], w.shape[2])) for w in originals.values())


def folder_bytes(model) -> int:
    """Return the bytes of all experts as the loaded model's files hold them."""
    runtime = model.moeflow
    return sum(record.num_bytes for layer in range(len(runtime.store.layers)) for record in runtime.records(layer))


def load_folder(folder: Path, args: argparse.Namespace):
    """Load a folder written by `moeflow quantize`."""
    from moeflow import load_moe

    return load_moe(folder, dtype=args.dtype, predictor=None)


def row_of(label: str, losses: dict, num_bytes: int, originals: dict[str, torch.Tensor]) -> dict:
    """Return a row's figures: perplexity, ratio to the baseline with its standard error, bytes."""
    row = {
        "format": label,
        "bits": 8 * num_bytes / sum(weight.numel() for weight in originals.values()),
        "expert_bytes": num_bytes,
    }
    for name, mine in losses[label].items():
        differences = [a - b for a, b in zip(mine, losses[BASELINE][name], strict=True)]
        ratio = math.exp(statistics.mean(differences))
        error = ratio * statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        row[name] = {
            "perplexity": math.exp(statistics.mean(mine)),
            "ratio": ratio,
            "ratio_error": error,
            "windows": len(mine),
        }
    return row


def print_table(rows: list[dict], args: argparse.Namespace) -> None:
    """Print the rows as a markdown table."""
    print(f"{args.model}: windows of {args.window} tokens, at most {args.tokens} tokens a text; ratio to {BASELINE}\n")
    names = list(TEXTS)
    print("| experts | bits a weight | MB | " + " | ".join(f"{name} | ratio" for name in names) + " |")
    print("|---" * (3 + 2 * len(names)) + "|")
    for row in rows:
        cells = [row["format"], f"{row['bits']:.2f}", f"{row['expert_bytes'] / 1e6:.0f}"]
        for name in names:
            spread = "" if row[name]["ratio_error"] is None else f" ± {row[name]['ratio_error']:.4f}"
            cells += [f"{row[name]['perplexity']:.3f}", f"{row[name]['ratio']:.4f}{spread}"]
        print("| " + " | ".join(cells) + " |")


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"eval: {text}", file=sys.stderr, flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    data = Path(os.environ.get("MOEFLOW_TEST_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=default_demo_path(), help="unquantised checkpoint folder (the demo model)"
    )
    parser.add_argument(
        "--formats",
        default="int8:rtn,int4-g64:hqq,int4-g64:rtn,int3-g64:hqq,int2-g64:hqq",
        help='comma separated, FORMAT or FORMAT:METHOD; "" for none',
    )
    parser.add_argument(
        "--folder", type=Path, action="append", default=[], help="a folder of `moeflow quantize`; may be repeated"
    )
    parser.add_argument("--data", type=Path, default=data, help="folder of the texts")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text (16384)")
    parser.add_argument("--window", type=int, default=512, help="tokens predicted from one beginning (512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of computing (float32)")
    parser.add_argument("--threads", type=int, default=1, help="of computing (1)")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
    if args.tokens < 2 or args.window < 2 or args.threads < 1:
        parser.error("--tokens and --window must be at least 2, --threads at least 1")
    args.formats = [label.strip() for label in args.formats.split(",") if label.strip()]
    args.formats = [label for label in args.formats if label != BASELINE]
    try:
        for label in args.formats:
            split_label(label)
    except ConfigError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
