"""The package as it is installed: what it imports, who imports whom, and which folders it consists of."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "placement", "predictors")

# Who may import whom: a module imports only from rows above its own, or from its own row's neighbours named here.
RANKS = [
    {"core", "errors", "dtypes", "compiled", "random_bits", "route_observer"},
    {
        "config",
        "layers",
        "hardware",
        "misses",
        "stats",
        "trace_format",
        "checkpoint",
        "plots",
        "realised",
        "locality",
        "replay_loop",
        "demo_text",
        "expert_statistics",
        "medoids",
        "regroup_loop",
        "likely_routes",
        "kernels",
        "predictors",
        "placement",
        "parallel_group",
        "key_values",
        "sequences",
        "parallel_routes",
        "sampling",
        "detokenizer",
        "reading",
        "batch_file",
        "hf_version",
        "batch_share",
    },
    {
        "stop_strings",
        "batch_request",
        "parallel_traffic",
        "metrics",
        "forecast",
        "switch",
        "native",
        "pieces",
        "placement_plots",
        "regroup",
        "hf_experts",
        "hf_decoding",
    },
    {"native_values", "calibration_text", "regroup_exact", "scheduler", "regroup_bound", "engine_prompts"},
    {
        "cache",
        "routing",
        "store",
        "best_split",
        "pool",
        "streams",
        "packed",
        "dispatch",
        "dense",
        "native_records",
        "hf_quantizer",
    },
    {
        "quantized",
        "compute",
        "transfer",
        "sources",
        "governor",
        "prefetch",
        "fingerprint",
        "trace_sources",
        "replay",
        "prediction",
        "residual",
        "packed_attention",
        "hf",
    },
    {"lookahead_record", "calibration", "pruning", "workloads", "engine_request", "engine_groups", "engine_pass"},
    {"host_compute", "prediction_loop", "link_replay", "recorder", "live_predictor"},
    {"residency", "clairvoyant", "engine"},
    {"serving", "pack", "info", "machine_replay"},
    {"runtime", "quantize"},
    {"experts"},
    {"parallel_round"},
    {"model", "parallel"},
    {"mixed_precision", "expert_inputs"},
    {"answer", "folders", "prompts", "loading_cli"},
    {"report"},
    {"progress"},
    {"predictor_cli", "machine_cli", "quantize_cli"},
    {
        "parallel_cli",
        "batch_figures",
        "screen",
        "demo_recipe",
        "demo_source",
        "trace_report",
        "place_table",
        "place_problem",
    },
    {"conversation", "demo_checkpoint", "replay_cli", "place_cli", "tiers_cli"},
    {"demo_model", "batch"},
    {"about", "chat", "trace_cli", "batch_cli"},
    {"cli"},
    {"__main__"},
]
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}


def imported_modules(file):
    """Yield the moeflow modules a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moeflow":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moeflow.")]


def test_imports_go_in_one_direction():
    for file in sorted((ROOT / "moeflow").glob("*.py")):
        if file.stem == "__init__":
            continue
        assert file.stem in RANK_OF, f"{file.stem} has no place in the order of imports"
        for name in imported_modules(file):
            if name in ("__version__",):
                continue
            assert RANK_OF[name] < RANK_OF[file.stem], f"{file.stem} imports {name}, which stands above it"


@pytest.mark.parametrize("folder", FOLDERS)
def test_families_know_only_what_stands_lowest(folder):
    for file in (ROOT / folder).rglob("*.py"):
        allowed = {"core", "dtypes", "errors", "config", "compiled", "random_bits", folder}
        assert set(imported_modules(file)) <= allowed, file


def test_only_the_hf_files_know_transformers_internals():
    public = {"transformers", "transformers.utils"}
    for file in (ROOT / "moeflow").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                known = file.stem in {"hf", "hf_experts", "hf_quantizer", "hf_decoding"}
                assert node.module in public or known, f"{file.name} imports {node.module}"


def test_no_folder_shadows_another_package():
    for folder in FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists(), "a bare package breaks transformers' probe"


def test_every_package_is_listed_for_the_wheel():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setup["packages"]) == {"moeflow", *(f"moeflow.{folder}" for folder in FOLDERS)}
    assert setup["package-dir"] == {"moeflow": "moeflow", **{f"moeflow.{folder}": folder for folder in FOLDERS}}
    below = [path for name in ("moeflow", *FOLDERS) for path in (ROOT / name).iterdir()]
    assert not [path for path in below if path.is_dir() and path.name != "__pycache__"], "keep packages flat"


def test_importing_moeflow_is_light():
    code = "import sys, moeflow; print([n for n in ('torch', 'transformers', 'numpy', 'rich') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys, moeflow.cli\n"
        "try: moeflow.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'transformers', 'numpy', 'rich', 'prompt_toolkit') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip().endswith("[]")


def test_checkout_is_one_tree_even_beside_another_copy(tmp_path):
    """A sub-package must come from the checkout whose moeflow was imported."""
    code = "import moeflow.kernels.expert_mlp as e, moeflow; print(moeflow.__file__); print(e.__file__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    package, kernel = map(Path, run.stdout.split())
    assert package.parent.parent == kernel.parent.parent == ROOT
