"""Two checkouts decode in turns: equal ones give equal tokens, and one that changes an answer is found out."""

import json
import shutil

import pytest

import bench_before_after
from helpers.paths import ROOT

# A checkout whose models choose the least likely token.
_BROKEN = """

_load_of = __getattr__


def __getattr__(name):
    if name != "load_moe":
        return _load_of(name)

    def load_moe(*arguments, **options):
        model = _load_of(name)(*arguments, **options)
        model.lm_head.weight.data.neg_()
        return model

    return load_moe
"""


def run(folder, before, capsys):
    options = ["--before", str(before), "--model", str(folder), "--expert-memory", "50%", "--tokens", "4"]
    code = bench_before_after.main([*options, "--rounds", "2", "--dtype", "float32", "--threads", "1"])
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_a_checkout_against_itself_gives_the_same_tokens_and_a_ratio(speaking_folder, capsys):
    code, out = run(speaking_folder, ROOT, capsys)
    result = json.loads(out.splitlines()[-1])
    (row,) = result["rows"]
    assert code == 0
    assert row["same_tokens"]
    assert len(row["speeds"]["before"]) == len(row["speeds"]["after"]) == row["ratio"]["n"] == 2
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert row["token_bytes"] > result["card"]["expert_bytes_a_token"] > 0


@pytest.mark.slow
def test_different_tokens_end_with_code_1(speaking_folder, tmp_path, capsys):
    shutil.copytree(ROOT / "moeflow", tmp_path / "moeflow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("kernels", "placement", "predictors", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    with open(tmp_path / "moeflow" / "__init__.py", "a") as file:
        file.write(_BROKEN)
    code, out = run(speaking_folder, tmp_path, capsys)
    assert code == 1
    assert "TOKENS DIFFER" in out
    assert not json.loads(out.splitlines()[-1])["rows"][0]["same_tokens"]


def test_a_folder_without_moeflow_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_before_after.main(["--before", str(tmp_path)])
    assert "no checkout of moeflow" in capsys.readouterr().err
