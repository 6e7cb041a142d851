"""The table and the picture of a comparison, made of results that are written down here."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.image import imread

from agents.runs import CONFIG_KEYS
from benchmarks import compare
from benchmarks.experiment import finished


def test_a_cell_has_the_t_interval_over_seeds() -> None:
    # 4.3027 (97.5 % of Student's t, 2 degrees of freedom) · 0.1 / √3 = 0.2484
    assert compare.cell([0.1, 0.2, 0.3], 3) == "0.200 [-0.048, 0.448] (0.100, 0.200, 0.300)"
    assert compare.cell([0.1, 0.3], 3).endswith("(0.100, 0.300; 1 missing)")
    assert compare.cell([0.25], 3) == "(0.250; 2 missing)"
    assert compare.cell([0.25], 1) == "0.250"
    assert compare.cell([], 3) == "not run"
    assert compare.cell([], 0) == "cannot play it"


def test_the_table_and_the_picture_show_what_was_run(tmp_path: Path) -> None:
    envs = ("DialogueQA-v0", "RecommendationClicks-v0")
    a = compare.Arguments(out=tmp_path, envs=envs, agents=("ppo", "linucb"), seeds=(1, 2))
    for env, agent, scores in (
        (envs[0], "ppo", (0.5, 0.7)),
        (envs[1], "linucb", (0.7, 0.8)),
    ):
        for run, score in zip(compare.runs_of(env, agent, a), scores, strict=True):
            folder = tmp_path / run.name
            written = {
                "config.json": {**dict.fromkeys(CONFIG_KEYS), "report": "test", "steps": 4},
                "checkpoints/last/state.json": {"env_steps": 4},
                "result.json": {"before": {"score": 0.25}, "after": {"score": score}},
                "done": None,
            }
            for name, content in written.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(json.dumps(content))
            assert finished(folder)
    assert compare.rows(a) == {
        compare.INITIAL: {envs[0]: [0.25], envs[1]: []},
        "ppo": {envs[0]: [0.5, 0.7], envs[1]: []},
        "linucb": {envs[0]: [], envs[1]: [0.7, 0.8]},
    }
    heads, _, initial, ppo, linucb = compare.markdown(a).splitlines()
    assert (
        heads == "| agent | DialogueQA-v0, 3,072 answers | RecommendationClicks-v0, 1,024 answers |"
    )
    assert initial == "| (initial policy) | 0.250 | not run |"
    assert ppo.startswith("| `ppo` | 0.600 [")
    assert ppo.endswith("(0.500, 0.700) | not run |")
    assert linucb.startswith("| `linucb` | cannot play it | 0.750 [")
    compare.plot(a, tmp_path / "picture.png")
    assert (imread(tmp_path / "picture.png")[..., :3] < 0.5).any()
