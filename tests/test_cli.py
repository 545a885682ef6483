"""The command line: what it refuses, in one line, with exit code 2 and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.cli import main


def refused(capsys: pytest.CaptureFixture[str], root: Path, *arguments: object) -> str:
    """The one line of a refusal; nothing may have been written."""
    assert main([*map(str, arguments), "--root", str(root)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert not root.exists()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retrain", "--source", "folder:/no/such/folder"), "no folder /no/such/folder"),
        (("ingest", "--source", "fodler:/tmp"), "unknown source 'fodler:/tmp'"),
        (
            ("pull", "--model", "models:/a/1", "--directory", "here"),
            "'--model' is given by its place: vae-flows pull MODEL DIRECTORY",
        ),
        (("retrain", "--epoch", 3), "unknown option '--epoch' of retrain: did you mean '--epochs'?"),
        (("train", "--epochs", "many"), "training.epochs='many': Input should be a valid integer"),
        (("train", "--epochs", 0), "epochs=0 must be in [1, inf]"),
        (("train", "--network", "conf"), "network='conf' is not one of"),
        (("train", "--preset", "textbok"), "did you mean 'textbook'?"),
        (("train", "--height", 4), "height=4 must be in [8, 256]"),
        (("train", "--max-reject-share", 2), "max_reject_share='2': Input should be less than or equal to 1"),
        (("encode",), "no model given: --model models:/NAME@champion"),
        (("encode", "--model", "/no/bundle"), "no model bundle in '/no/bundle'"),
        (("sample", "--model", "models:/digits@champion"), "there is no registry under root"),
        (("sample", "--model", "models:/digits"), "is not models:/NAME@ALIAS or models:/NAME/VERSION"),
        (("pull", "models:/digits/1", "/tmp/x"), "there is no registry under root"),
        (("retrain", "--config", "/no/such.toml"), "--config '/no/such.toml' can't be read as TOML"),
        (("ingest", "extra"), "unexpected argument 'extra' of ingest"),
        (("tables", "shwo", "/tmp"), "action='shwo' is not one of 'list', 'show', 'verify', 'gc', 'files'"),
        (("tables", "shwo", "/tmp"), "did you mean 'show'?"),
        (
            ("ingest", "--fit", "corp"),
            "fit='corp' is not one of 'crop', 'pad', 'stretch': did you mean 'crop'?",
        ),
        (("retrain", "--objective", "elbw"), "did you mean 'elbo'?"),
        (("retrain", "--runner", "spark"), "runner 'spark' is not here, processes:N, ray or ray://HOST:PORT"),
        (("reconcile",), "there is no registry under root"),
    ],
)
def test_bad_input_gets_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/root/mlflow.db")
    assert message in refused(capsys, tmp_path / "root", *arguments)


def test_an_empty_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    assert "no files in" in refused(
        capsys, tmp_path / "root", "retrain", "--source", f"folder:{tmp_path}/images"
    )


def test_a_root_that_cannot_be_written_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert main(["retrain", "--root", str(tmp_path / "file")]) == 2
    assert "can't be" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "not a folder"


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retran"]) == 2
    assert "did you mean 'retrain'?" in capsys.readouterr().err


def test_toml_stands_under_the_command_line_and_comes_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_reject_share = 0.5\n[training]\nepochs = 7\nseed = 9\n[model]\nhidden = [8, 16]\n")
    shown = ["train", "--config", str(file), "--epochs", "3", "--root", str(tmp_path / "root"), "--dry-run"]
    assert main(shown) == 0
    printed = capsys.readouterr().out
    values = tomllib.loads(printed)
    assert (values["max_reject_share"], values["training"]["epochs"], values["training"]["seed"]) == (
        0.5,
        3,
        9,
    )
    assert values["model"]["hidden"] == [8, 16]
    file.write_text(printed)
    assert main(["train", "--config", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out == printed
    assert not (tmp_path / "root").exists()


def test_a_misspelt_field_of_toml_names_the_nearest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("[training]\nlearningrate = 0.1\n")
    line = refused(capsys, tmp_path / "root", "train", "--config", file)
    assert "unknown field 'learningrate' in training: did you mean 'learning_rate'?" in line


@pytest.mark.parametrize("arguments", [("--help",), ("retrain", "--dry-run", "--json")])
def test_a_reader_may_leave_early(arguments: tuple[str, ...]) -> None:
    line = [sys.executable, "-m", "flows.cli", *arguments]
    # Unbuffered, argparse itself would meet the closed pipe, and keep silent.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize("command", ["retrain", "ingest", "train", "evaluate", "encode", "sample", "pull"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--root" in capsys.readouterr().out
