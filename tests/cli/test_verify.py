"""`moeflow verify`: what it prints, its exit codes, and what it refuses."""

import json

import pytest

from helpers.changed_models import save_changed
from moeflow.cli.main import main
from moeflow.convert.quantize import quantize_model


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a mixture of experts, of which every token takes two " * 3)
    return str(file)


def test_a_sound_model_is_equal(speaking_folder, text_file, capsys):
    assert main(["verify", str(speaking_folder), "--text", text_file, "--tokens", "40"]) == 0
    assert capsys.readouterr().out.startswith("equal: 40 tokens, 3 layers, bound 1e-05 (float32)")


def test_a_difference_is_exit_code_1_in_words_and_in_json(mixtral, speaking_folder, text_file, tmp_path, capsys):
    def change(experts):
        experts[1].down_proj[:, 0, 0] = 3.0

    folder = save_changed(mixtral, tmp_path / "changed", change)
    for file in speaking_folder.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    command = ["verify", str(folder), "--reference", str(speaking_folder), "--text", text_file]
    assert main(command) == 1
    assert "layer 1 (model.layers.1.mlp.experts), expert" in capsys.readouterr().out
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert {one["layer"] for one in found["findings"]} == {1}
    assert found["reference"] == str(speaking_folder)


def test_against_tells_the_cost_by_layer(speaking_folder, text_file, tmp_path, capsys):
    int2 = quantize_model(speaking_folder, tmp_path / "int2", "int2-g32", method="rtn").folder
    command = ["verify", str(speaking_folder), "--against", str(int2), "--text", text_file]
    assert main(command) == 0
    assert "KL" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert len(cost["layers"]) == 3
    assert cost["divergence"] > 0


def test_what_cannot_be_compared_is_told_in_one_line(speaking_folder, tmp_path, capsys):
    assert main(["verify", str(speaking_folder), "--text", str(tmp_path / "none.txt")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("moeflow: --text")
    with pytest.raises(SystemExit):
        main(["verify", str(speaking_folder), "--reference", "a", "--against", "b"])
