"""How a text that was written, and a comparison, look in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text


def generation_lines(written: Mapping[str, Any]) -> Iterator[Text]:
    """One line of numbers: tokens and their speed, bytes of the cache against a full one, what left it."""
    from rich.text import Text

    from partwise.report import format_bytes, format_seconds

    seconds, speed = written["prompt_seconds"] + written["seconds"], written["tokens_per_second"]
    held, most, full = (format_bytes(written[name]) for name in ("bytes", "max_bytes", "bytes_full"))
    line = f"{written['num_new_tokens']:,} tokens after {written['num_prompt_tokens']:,} in {format_seconds(seconds)}"
    line += f"{'' if speed is None else f', {speed:.1f} tokens/s'}; cache {held}, never above {most}"
    if not written["evictions"]:
        line += "; nothing had to leave"
    else:
        line += f", a full one {full}; {written['evictions']:,} evictions"
        if written["mass_kept"] is not None:
            line += f", {100 * written['mass_kept']:.1f} % of the attention kept at one"
    yield Text(line, style="dim")


def served_lines(served: Mapping[str, Any]) -> Iterator[Text]:
    """What a server did until it was stopped."""
    from rich.text import Text

    tokens, memory = served["tokens"], served["memory"]
    speed = "" if tokens["per_second"] is None else f", {tokens['per_second']:.1f} tokens/s"
    line = (
        f"stopped; {tokens['generated']:,} tokens written{speed}, {tokens['prompt']:,} of prompts, {tokens['reused']:,} of these found in a cache; "
    )
    yield Text(f"{line}{memory['conversations']:,} conversations kept, {memory['forgotten']:,} forgotten", style="dim")


def comparison_parts(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Tables and lines for the terminal, from the content of ``summary.json``."""
    from rich.text import Text

    from partwise.report import format_seconds
    from partwise.serve._report import rows_of, text_of, verdict_of

    yield comparison_table(summary)
    read = f"{rows_of(summary)} from {text_of(summary)}"
    yield Text(f"{summary['model']} on {read}, {summary['full']['num_scored']:,} predictions scored, took {format_seconds(summary['seconds'])}")
    yield Text(verdict_of(summary))
    yield Text(f"report   {summary['report'] or 'not drawn'}\nrun      {summary['run']}")


def comparison_table(summary: Mapping[str, Any]) -> Table:
    """The full cache, then for each budget a row per method, the best perplexity first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from partwise.report import format_bytes, format_metric
    from partwise.serve._report import by_budget, format_change, format_speed

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for label in ("method", "perplexity", "change", "KL", "bytes", "fewer", "tokens/s"):
        table.add_column(label, justify="left" if label == "method" else "right", no_wrap=True)
    full = summary["full"]
    table.add_row(
        "full cache", format_metric(full["perplexity"]), "", "", format_bytes(full["peak_bytes"]), "", format_speed(full["tokens_per_second"])
    )
    for budget, rows in by_budget(summary).items():
        table.add_row(Text(f"budget {budget:,}", style="bold"))
        for row in rows:
            table.add_row(
                f"  {row['method']}",
                format_metric(row["perplexity"]),
                format_change(row["perplexity_change"]),
                f"{row['kl']:.3g}",
                format_bytes(row["peak_bytes"]),
                f"{row['ratio']:.1f} x",
                format_speed(row["tokens_per_second"]),
            )
    return table
