"""Agents that train language-model policies with immediate rewards."""

from agents.immediate_reward import ImmediateReward
from agents.policies import CandidatePolicy, CausalLMPolicy
from agents.ppo import GRPO, PPO
from agents.reinforce import RLOO, Reinforce
from agents.supervised import Supervised

__all__ = [
    "GRPO",
    "PPO",
    "RLOO",
    "CandidatePolicy",
    "CausalLMPolicy",
    "ImmediateReward",
    "Reinforce",
    "Supervised",
]
