"""Small quantised checkpoints, made once for a module."""

import shutil

import pytest
import torch

from helpers.prequantized_checkpoints import (
    is_linear,
    make,
    tiny_model,
)
from helpers.prequantized_models import CASES, Made


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    torch.set_num_threads(1)
    case = CASES[request.param]
    model = tiny_model(case.family, **case.sizes)
    folders = make(tmp_path_factory.mktemp("case"), model, case.quantization, case.quantise, case.is_quantised)
    return Made(*folders, case.format)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders that tests copy before they damage them, with their unquantised source beside them."""
    found = {}
    for name in ("gptq, mixtral", "fp8, qwen3"):
        case, folder = CASES[name], tmp_path_factory.mktemp("original")
        make(folder, tiny_model(case.family, **case.sizes), case.quantization, case.quantise, is_linear)
        found[case.quantization["quant_method"]] = folder
    return found


@pytest.fixture
def gptq(originals, tmp_path):
    """A GPTQ Mixtral that a test may damage."""
    return shutil.copytree(originals["gptq"], tmp_path / "gptq") / "native"


@pytest.fixture
def fp8(originals, tmp_path):
    """A FP8 Qwen3-MoE that a test may damage."""
    return shutil.copytree(originals["fp8"], tmp_path / "fp8") / "native"
