"""The loading options that several commands share, and the loading itself."""

from contextlib import nullcontext

from moeflow.errors import MoeflowError

_MEMORY_HELP = 'bytes, "6GiB", "600MB", "25%%" of all experts, or "auto"'


def add_loading_options(parser, *, compiles: bool = True) -> None:
    """Add the options of load_moe, and --json, to a command.

    Args:
        compiles: whether --compile has an effect on what the command does.
    """
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    parser.add_argument("--dtype", default="auto", help='"auto", "float32", "bfloat16" or "float16"')
    parser.add_argument("--expert-memory", default="auto", metavar="SIZE", help=_MEMORY_HELP)
    parser.add_argument("--host-memory", default="auto", metavar="SIZE", help=f"pinned, CUDA only: {_MEMORY_HELP}")
    parser.add_argument("--policy", default="auto", help="eviction: lru, lfu, lfru, static, forecast or auto")
    parser.add_argument(
        "--predictor", default="auto", metavar="P", help='who says what to prefetch: "auto", a name, a file, or "none"'
    )
    parser.add_argument(
        "--miss",
        default="copy",
        help='"copy", or "cheapest": on a GPU, the CPU may compute experts in host memory; lossy',
    )
    parser.add_argument("--quantization", metavar="F", help="round experts as they are read: int8, int4 ...; lossy")
    parser.add_argument(
        "--prune",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out this share of experts behind the first; lossy",
    )
    if compiles:
        parser.add_argument("--compile", action="store_true", help="torch.compile: a slow start, then faster decoding")
    else:
        parser.set_defaults(compile=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object with answer and figures")


def load_model(source, arguments, **options):
    """Load model and tokenizer, with the loader's progress only where somebody looks at it.

    Args:
        arguments: what `add_loading_options` parsed.
        **options: passed to load_moe as well.
    """
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True)
    with Status(f"loading {source}", console=console) if console.is_terminal else nullcontext():
        from transformers import AutoTokenizer
        from transformers.utils import logging

        from moeflow.loading.load_moe import load_moe

        logging.disable_progress_bar()
        names = (
            "device",
            "dtype",
            "expert_memory",
            "host_memory",
            "policy",
            "miss",
            "quantization",
            "prune",
            "compile",
        )
        options["predictor"] = None if arguments.predictor == "none" else arguments.predictor
        model = load_moe(source, **{name: getattr(arguments, name) for name in names}, **options)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise MoeflowError(f"{source} has no tokenizer that transformers can load: {error}") from error
    return model, tokenizer
