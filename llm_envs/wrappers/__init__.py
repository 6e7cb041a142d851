"""Wrappers: other views of the same environments. They import no torch."""

from llm_envs.wrappers.numeric_view import NumericView
from llm_envs.wrappers.token_view import TokenView

__all__ = ["NumericView", "TokenView"]
