"""The demonstration's table and page."""

from __future__ import annotations

from pathlib import Path

from collm.evaluation.intervals import wilson_interval
from collm.reporting.html import heading, paragraph, token_view, write_page
from collm.reporting.html import table as html_table

from .pipeline import Result

WHAT = (
    "The base reads and writes word problems but cannot calculate: in all the text it was pretrained on, results were "
    "random. The assistant calculates but cannot read or write: it was pretrained on equations "
    "among words in no order. Both were trained from random weights a few minutes ago."
)
HOW = (
    "The fine-tuned base and the collaborating base saw the same solved problems with the same settings. Nobody told "
    "the collaborating base which tokens to hand over: it learned that from the likelihood of the solutions. All "
    "numbers are measured on problems that no model has seen; exact means that the answer is right and in the form "
    "asked for."
)


def rows(result: Result) -> list[dict[str, str]]:
    """The table's rows, formatted."""
    shown = []
    for row in result.rows:
        low, high = wilson_interval(sum(row.solved), len(row.solved))
        shown.append(
            {
                "who writes": row.name,
                "exact": f"{row.exact:.1%}",
                "95% interval": f"{low:.0%} to {high:.0%}",
                "deferred tokens": f"{row.deferred:.1%}" if row.deferred else "",
            }
        )
    return shown


def table(result: Result) -> str:
    """The table as text for a terminal."""
    lines = rows(result)
    widths = {key: max(len(key), *(len(line[key]) for line in lines)) for key in lines[0]}
    keys = list(widths)

    def line(cells: dict[str, str]) -> str:
        return "  ".join(cells[k].ljust(widths[k]) if k == keys[0] else cells[k].rjust(widths[k]) for k in keys)

    return "\n".join([line({k: k for k in keys}), "  ".join("-" * widths[k] for k in keys), *map(line, lines)])


def page(result: Result, path: Path) -> Path:
    """Write the self-contained HTML page and return its path."""
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    times = [{"stage": stage, "seconds": f"{seconds:.1f}"} for stage, seconds in result.seconds.items()]
    return write_page(
        path,
        "Two tiny models that need each other",
        paragraph(WHAT),
        html_table(rows(result), f"{len(result.rows[0].solved)} unseen problems, greedy; {settings}"),
        paragraph(HOW),
        heading("Who wrote what"),
        *(token_view(view) for view in result.views),
        heading("Where the time went"),
        html_table(times),
    )
