"""Every agent on every environment, at equal environment steps, with the presets."""

from benchmarks.suites import Suite, grid, seed_by_seed

LEARNERS = ("reinforce", "rloo", "ppo", "grpo", "immediate-reward", "supervised", "random")
ON_WRITING = (*LEARNERS, "sb3-ppo", "sb3-a2c")
ON_CHOOSING = (*LEARNERS, "linucb", "thompson", "sb3-ppo", "sb3-a2c", "sb3-dqn")
SEEDS = (1, 2, 3)

SUITE = Suite(
    "core",
    "What does every agent learn from equally many answers, from the embedded model on?",
    seed_by_seed(
        grid({"DialogueQA-v0": 3072, "Summarization-v0": 1024}, ON_WRITING, SEEDS),
        grid({"RecommendationClicks-v0": 1024}, ON_CHOOSING, SEEDS),
    ),
)
