"""Policies: what answers an observation and can be trained."""

from agents.policies.candidate import CandidatePolicy
from agents.policies.causal_lm import CausalLMPolicy

__all__ = ["CandidatePolicy", "CausalLMPolicy"]
