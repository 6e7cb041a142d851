"""Agents that train language-model policies with immediate rewards."""

from agents.policies import CandidatePolicy, CausalLMPolicy
from agents.reinforce import Reinforce

__all__ = ["CandidatePolicy", "CausalLMPolicy", "Reinforce"]
