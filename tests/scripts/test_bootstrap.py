"""``scripts/bootstrap``: an environment that was left half made is made anew."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_an_environment_without_pip_is_made_anew(tmp_path: Path) -> None:
    for name in ("scripts/bootstrap", "scripts/constraints.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    # What a failed `python -m venv` leaves: a Python that has no pip.
    executable(tmp_path / ".venv/bin/python", 'test -x .venv/bin/pip || exec echo "No module"')
    executable(
        tmp_path / "python",
        f'case "$2" in venv) echo made > made; : > .venv/bin/pip; chmod +x .venv/bin/pip;; '
        f'*) exec {sys.executable} "$@";; esac',
    )
    environment = {**os.environ, "PYTHON": str(tmp_path / "python")}
    for _ in range(2):
        done = subprocess.run(
            [tmp_path / "scripts/bootstrap"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "made").exists()
        assert "No module" not in done.stdout
        (tmp_path / ".venv" / "installed").unlink()
        (tmp_path / "made").write_text("once")
    assert (tmp_path / "made").read_text() == "once"
