"""The package as users get it: a wheel with data and model, and scripts that explain themselves."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Whatever pip is asked, it must not look for anything on the network.
OFFLINE = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: in the tree, a build leaves files and takes up old ones."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("llm_envs", "agents", "benchmarks"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*pip, "--wheel-dir", str(out), str(source)], env=OFFLINE, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = out.iterdir()
    assert path.suffix == ".whl"
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed in, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
    done = subprocess.run(
        [*pip, "--target", str(folder), str(wheel)], env=OFFLINE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def data_in(folder: Path) -> set[str]:
    """Give the files of a package that are no modules, from the folder that holds the package."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.parent != folder
    }


def test_the_wheel_holds_data_and_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {info.filename: info.file_size for info in archive.infolist()}
    wanted = data_in(ROOT / "llm_envs" / "datasets") | data_in(ROOT / "agents" / "policies")
    assert {Path(name).name for name in wanted} >= {
        "model.safetensors", "tokenizer.json", "ratings.csv.gz", "data.jsonl.gz", "CARD.md",
    }  # fmt: skip
    assert wanted <= held.keys()
    assert {"llm_envs/py.typed", "agents/py.typed"} <= held.keys()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "agents").rglob("*.py")}
    assert modules <= held.keys()
    assert not any(name.startswith(("tests/", "scripts/")) for name in held)
    assert any(name.endswith("LICENSE") and ".dist-info/" in name for name in held)


def test_package_data_is_20_mb_at_most(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    data = {name: size for name, size in sizes.items() if not name.endswith(".py")}
    assert sum(data.values()) <= 20 * 10**6, sorted(data, key=data.__getitem__)[-5:]
    model = [size for name, size in data.items() if name.startswith("agents/policies/tiny/")]
    assert sum(model) <= 12 * 10**6


USE = """
import importlib.util, json, sys
import llm_envs, agents
import gymnasium as gym
from agents.policies import CausalLMPolicy

played = {}
for id in llm_envs.registered_ids():
    if id == "TextWorld-v0" and importlib.util.find_spec("textworld") is None:
        continue  # its extra is not installed
    env = gym.make(id, split="test")
    observation, info = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    played[id] = info["score"]
policy = CausalLMPolicy.from_pretrained("tiny", device="cpu")
env = gym.make("DialogueQA-v0", split="test")
observation, _ = env.reset(seed=1)
answer = policy.begin().act({0: observation}, 0)[0]
print(json.dumps({
    "played": played,
    "answer": answer,
    "files": [m.__file__ for n, m in sys.modules.items() if n.startswith(("llm_envs", "agents"))],
    "path": sys.path,
    "finders": [str(f) for f in sys.meta_path],
}))
"""

# An editable install would answer for whatever the wheel lacks. Its finder is taken out, and its
# folder from the path, before anything is imported.
WITHOUT_THE_REPOSITORY = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
sys.path = [p for p in sys.path if p != {str(ROOT)!r}]
"""


def test_the_installed_package_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REPOSITORY + USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"DialogueQA-v0", "Summarization-v0", "RecommendationClicks-v0"} <= found[
        "played"
    ].keys()
    assert all(0 <= score <= 1 for score in found["played"].values())
    assert isinstance(found["answer"], str)
    assert len(found["files"]) > 20
    for file in found["files"]:
        assert Path(file).is_relative_to(installed), file
    assert str(ROOT) not in found["path"]
    assert not any("editable" in finder.lower() for finder in found["finders"])
    assert list(tmp_path.iterdir()) == []


def test_the_commands_of_the_installed_package_explain_themselves(
    installed: Path, tmp_path: Path
) -> None:
    run = "import runpy; runpy.run_module('agents.train', run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REPOSITORY + run, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize(
    ("script", "told"),
    [("quickstart", ["--seed", "--steps", "--out", "--resume"]), ("test", ["-m slow", "pytest"])],
)
def test_scripts_explain_themselves_before_anything_is_installed(
    tmp_path: Path, script: str, told: list[str], flag: str
) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [str(tmp_path / "scripts" / script), flag],
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (f"scripts/{script}", *told):
        assert words in done.stdout
    assert sorted(tmp_path.rglob("*")) == before  # nothing was installed
