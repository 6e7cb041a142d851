"""A few minutes of everything: to see that sweep and report work."""

from benchmarks.suites import Suite, grid, seed_by_seed

SEEDS = (1, 2)
ON_WRITING = ("reinforce", "ppo", "random")
ON_CHOOSING = ("linucb", "thompson", "random")

SUITE = Suite(
    "smoke",
    "Does everything run? Too short to say who is better.",
    seed_by_seed(
        grid({"DialogueQA-v0": 256}, ON_WRITING, SEEDS, report="validation"),
        grid({"RecommendationClicks-v0": 256}, ON_CHOOSING, SEEDS, report="validation"),
    ),
)
