"""The wall: foreign exceptions become errors of moeflow's, and nothing else does."""

import pytest
import torch

from moeflow.errors import CheckpointError, ConfigError
from moeflow.hf.wall import one_line, wall

PanicException = type("PanicException", (BaseException,), {})  # what libraries in Rust raise


def tell(error: BaseException) -> ConfigError:
    return ConfigError(f"the file: {one_line(error)}")


@pytest.mark.parametrize("error", [KeyError("act"), RecursionError("deep"), MemoryError(), PanicException("at 5")])
def test_a_foreign_exception_is_told_with_the_original_as_its_cause(error):
    with pytest.raises(ConfigError, match=f"the file: {type(error).__name__}") as caught, wall(tell):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(2), CheckpointError("ours"), torch.OutOfMemoryError("of the GPU")]
)
def test_interrupts_own_errors_and_a_full_gpu_pass(error):
    with pytest.raises(type(error)) as caught, wall(tell):
        raise error
    assert caught.value is error


def test_what_our_own_code_raised_inside_the_call_passes():
    ours = [ZeroDivisionError("in a callback")]
    with pytest.raises(ZeroDivisionError), wall(tell, ours=ours):
        raise ours[0]


def test_a_message_is_one_line_of_bounded_length():
    said = one_line(ValueError("several\nlines\n" + "x" * 10_000))
    assert said.startswith("ValueError: several lines x")
    assert "\n" not in said
    assert len(said) < 320
