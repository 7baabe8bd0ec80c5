"""Which GPUs a process sees, and what is said of one that is not there."""

import pytest

from moeflow.errors import ConfigError
from moeflow.machine.gpus import check_gpu, visible_numbers

UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33"]


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        ("", []),
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("1,7,0", [1]),
        ("1,-1,0", [1]),
        ("1,none,0", [1]),
        ("1,1", []),
        ("GPU-bb33,GPU-aa1", [2, 0]),
        ("GPU-aa,GPU-bb33", []),
        ("GPU-bb,GPU-bb33", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible, numbers):
    assert visible_numbers(visible, UUIDS) == numbers


@pytest.mark.parametrize(
    ("number", "count", "said"),
    [
        (0, 0, r"device='cuda:0' .* no CUDA GPU \(0 of them"),
        (7, 1, r"torch sees 1 GPU, cuda:0[^ ]* .*one of these"),
        (2, 2, "torch sees 2 GPUs, cuda:0 to cuda:1"),
    ],
)
def test_a_gpu_beyond_the_count_is_refused_with_the_count(monkeypatch, number, count, said):
    with pytest.raises(ConfigError, match=said) as refused:
        check_gpu(f"cuda:{number}", number, count)
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="with CUDA_VISIBLE_DEVICES=''"):
        check_gpu(f"cuda:{number}", number, count)


def test_a_gpu_within_the_count_is_taken():
    check_gpu("cuda:1", 1, 2)
