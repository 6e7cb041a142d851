"""RecommendationClicks: recommend films to real users, one at a time, and see the click at once."""

from __future__ import annotations

from collections.abc import Sequence

from llm_envs.core.task import say

OPENING = "Which film should I watch?"


def opening() -> str:
    """Return the first prompt of every session."""
    return say(OPENING)


def candidate_text(
    title: str, year: int | None, genres: Sequence[str], rating: float, count: int
) -> str:
    """Describe a film as a policy reads it; it begins with a space, as answers do.

    ``rating`` is the mean of the ``count`` ratings that training users gave it.
    """
    named = f" {title} ({year})" if year else f" {title}"
    kinds = f": {', '.join(genres)}." if genres else "."
    return f"{named}{kinds} Rated {rating:.1f} by {count}."


def describe_reply(clicked: bool) -> str:
    """Return what the user says to a recommendation."""
    return "I liked it." if clicked else "I did not like it."


def next_prompt(clicked: bool) -> str:
    """Return what follows a recommendation in the prompt of the next one."""
    return "\n" + say(f"{describe_reply(clicked)} What next?")
