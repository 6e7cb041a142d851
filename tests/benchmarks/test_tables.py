"""Tables: the same texts in Markdown and in the terminal."""

from __future__ import annotations

from rich.console import Console

from benchmarks.tables import Table, cell


def test_markdown_has_the_texts_and_escapes_what_would_end_a_cell() -> None:
    table = Table("title", ("a", "b"), (("1", "x|y"), ("", "2")), numbers=1)
    assert table.markdown() == "| a | b |\n| --- | ---: |\n| 1 | x\\|y |\n|  | 2 |"


def test_the_terminal_shows_title_header_and_rows() -> None:
    console = Console(width=60, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(Table("title", ("a", "b"), (("1", "x[/b]|y"),), numbers=1).rich())
    assert all(text in shown.get() for text in ("title", "a", "b", "1", "x[/b]|y"))


def test_a_cell_has_the_t_interval_over_seeds() -> None:
    # 4.3027 (97.5 % of Student's t, 2 degrees of freedom) · 0.1 / √3 = 0.2484
    assert cell([0.1, 0.2, 0.3]) == "0.200 [-0.048, 0.448] (0.100, 0.200, 0.300)"
    assert cell([0.25]) == "(0.250)"
    assert cell([]) == "–"
