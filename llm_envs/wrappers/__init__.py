"""Wrappers: other views of the same environments, and other feedback. They import no torch."""

from llm_envs.wrappers.feedback import CorruptedFeedback, CorruptedVectorFeedback, Corruption
from llm_envs.wrappers.numeric_view import NumericView
from llm_envs.wrappers.token_view import TokenView

__all__ = [
    "CorruptedFeedback",
    "CorruptedVectorFeedback",
    "Corruption",
    "NumericView",
    "TokenView",
]
