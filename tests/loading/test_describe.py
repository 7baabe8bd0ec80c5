"""What is told of a model in a GGUF file."""

from moeflow.cli.info import model_text
from moeflow.loading.describe import describe_model


def test_a_gguf_file_is_told_with_its_types_and_their_bytes(gguf_file):
    about = describe_model(gguf_file)
    values = 2 * 6 * 256 * 256
    assert about["gguf"]["architecture"] == "qwen3moe"
    assert about["gguf"]["types"]["experts"] == {"q4_k": 2 * values * 144 // 256, "q6_k": values * 210 // 256}
    assert list(about["gguf"]["types"]["dense"]) == ["q8_0", "f32"]
    assert sum(about["gguf"]["types"]["dense"].values()) == about["dense_bytes"]
    rows = model_text(about).renderables[0].columns
    told = dict(zip(rows[0].cells, rows[1].cells, strict=True))
    assert told["GGUF"] == "architecture qwen3moe"
    assert told["types"].startswith("experts: q4_k 864 KiB, q6_k 630 KiB; dense: q8_0 ")


def test_a_folder_that_holds_only_a_gguf_file_is_that_file(gguf_file):
    assert describe_model(gguf_file.parent)["experts_bytes"] == describe_model(gguf_file)["experts_bytes"]
