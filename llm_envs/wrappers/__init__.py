"""Wrappers: other views of the same environments, and other feedback. They import no torch."""

from llm_envs.wrappers.answer_in_text import AnswerInText, ChoosingInText, parse_choice
from llm_envs.wrappers.augmentation import Augmentation, AugmentedText, AugmentedVectorText
from llm_envs.wrappers.budgets import (
    TimeBudget,
    TimeVectorBudget,
    TokenBudget,
    TokenVectorBudget,
)
from llm_envs.wrappers.feedback import CorruptedFeedback, CorruptedVectorFeedback, Corruption
from llm_envs.wrappers.numeric_view import NumericView
from llm_envs.wrappers.token_view import TokenView

__all__ = [
    "AnswerInText",
    "Augmentation",
    "AugmentedText",
    "AugmentedVectorText",
    "ChoosingInText",
    "CorruptedFeedback",
    "CorruptedVectorFeedback",
    "Corruption",
    "NumericView",
    "TimeBudget",
    "TimeVectorBudget",
    "TokenBudget",
    "TokenVectorBudget",
    "TokenView",
    "parse_choice",
]
