"""Rows as a rich table. The only module that imports rich; it knows nothing of models."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]

CONVENTION = "L2(s) = s/2 * sum(w^2)"
_ROOT = "(model)"
_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")
_ENOUGH = 100_000  # columns; nothing is that wide


@dataclass(frozen=True)
class Sheet:
    """What a table shows: the rows of a policy and the figures around them."""

    rows: Sequence[Row]
    counts: Sequence[Row] = ()
    footer: Sequence[str] = ()
    decay: Mapping[str, str] | None = None
    """Weight decay by layer path."""
    values: Mapping[tuple[str, str], tuple[float, float]] | None = None
    """2-norm and penalty by layer path and site."""
    collapse: bool = True


@dataclass
class _Line:
    """One row a layer, or one for a stack of layers that look the same."""

    path: str
    cells: tuple[str, ...]
    numbers: list[tuple[float, float]] = field(default_factory=list)


def show(sheet: Sheet, console: Console | None = None) -> None:
    """Prints the sheet; on a non-terminal as wide as it needs, neither wrapped nor cut."""
    console = Console() if console is None else console
    drawn = draw(sheet)
    if console.is_terminal:
        console.print(drawn)
        return
    # Console.print crops at the console's own width, whatever the table yields, so the console is
    # widened for this print; _width is None where the width follows the environment.
    width, console._width = console._width, _natural_width(drawn, console)
    try:
        console.print(drawn)
    finally:
        console._width = width


def html(sheet: Sheet) -> str:
    """The sheet for a notebook."""
    console = Console(file=io.StringIO(), record=True, force_jupyter=False)
    show(sheet, console)
    return console.export_html(
        inline_styles=True, code_format="<pre style='line-height:1.2'>{code}</pre>"
    )


def draw(sheet: Sheet) -> Group:
    """The table, its footer and a line a rule."""
    lines = _lines(sheet)
    parts: list[Any] = [_table(sheet, lines)]
    if any(line.cells[-1] for line in lines):
        parts += [_notes(lines), Text("")]
    parts += [Text(line) for line in sheet.footer]
    if sheet.counts:
        parts += [Text(""), _rules(sheet.counts)]
    return Group(*parts)


def _natural_width(drawn: Group, console: Console) -> int:
    options = console.options.update(max_width=_ENOUGH)
    return max(Measurement.get(console, options, part).maximum for part in drawn.renderables)


def _table(sheet: Sheet, lines: list[_Line]) -> Table:
    heads = ["layer", "type", "shape", "terms", "mechanism", "rule"]
    heads += ["weight decay"] if sheet.decay is not None else []
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, overflow="fold")
    if sheet.values is not None:
        table.add_column("norm2", justify="right", overflow="fold")
        table.add_column("penalty", justify="right", overflow="fold")
    for line in lines:
        cells = [line.path or _ROOT, *line.cells[: len(heads) - 1]]
        if sheet.values is not None:
            cells += _figures(line.numbers)
        table.add_row(*map(Text, cells), style=None if line.cells[2] else "dim")
    return table


def _figures(numbers: list[tuple[float, float]]) -> list[str]:
    """The norms' range and the penalties' sum."""
    if not numbers:
        return ["", ""]
    norms = sorted(norm for norm, _ in numbers)
    low, high = f"{norms[0]:.4g}", f"{norms[-1]:.4g}"
    return [low if low == high else f"{low} .. {high}", f"{sum(p for _, p in numbers):.4g}"]


def _notes(lines: list[_Line]) -> Table:
    """What a row cannot say: a line a layer that has something to be said of."""
    grid = _grid(2)
    for line in lines:
        if line.cells[-1]:
            grid.add_row(Text(f"{line.path or _ROOT}:"), Text(line.cells[-1]), style="italic")
    return grid


def _grid(columns: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in range(columns):
        grid.add_column(overflow="fold")
    return grid


def _rules(counts: Iterable[Row]) -> Table:
    grid = _grid(4)
    for count in counts:
        reach = f"{_many(count['layers'], 'layer')}, {_many(count['entries'], 'entry', 'entries')}"
        lost = f", {count['overridden']} overridden" if count["overridden"] else ""
        cells = (
            f"rule {count['rule']}",
            str(count["where"]) or _ROOT,
            str(count["term"] or "None (clears)"),
            reach + lost,
        )
        grid.add_row(*map(Text, cells))
    return grid


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _lines(sheet: Sheet) -> list[_Line]:
    layers = [
        _line(path, list(rows), sheet)
        for path, rows in itertools.groupby(sheet.rows, key=lambda row: row["path"])
    ]
    return _collapse(layers) if sheet.collapse else layers


def _line(path: str, rows: list[Row], sheet: Sheet) -> _Line:
    acting = [row for row in rows if row["term"] is not None]
    shapes = dict.fromkeys(_shape(row["shape"]) for row in rows if row["shape"] is not None)
    mechanisms = dict.fromkeys(row["mechanism"] or "none" for row in acting)
    rules = sorted({row["rule"] for row in acting if row["rule"] is not None})
    notes = dict.fromkeys(row["note"] for row in rows if row["note"])
    cells = (
        rows[0]["layer"],
        ", ".join(shapes),
        _terms(acting),
        ", ".join(mechanisms),
        ", ".join(map(str, rules)),
        (sheet.decay or {}).get(path, ""),
        "; ".join(notes),
    )
    values = sheet.values or {}
    sites = dict.fromkeys((path, row["site"]) for row in acting)
    return _Line(path, cells, [values[site] for site in sites if site in values])


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _terms(acting: list[Row]) -> str:
    """`L1(0.1) + L2(0.2), bias: L2(0.3)`: the weight's and the call's terms need no name."""
    by_site: dict[str, list[str]] = {}
    for row in acting:
        by_site.setdefault(row["site"], []).append(row["term"])
    return ", ".join(
        (f"{site}: " if site not in ("weight", "call") else "") + " + ".join(terms)
        for site, terms in by_site.items()
    )


# --- collapsing numbered stacks ----------------------------------------------------------------


def _collapse(lines: list[_Line]) -> list[_Line]:
    """Lines that differ in their paths' numbers alone become one: `blocks.{0..11}.fc1 x12`."""
    groups: dict[Any, list[_Line]] = {}
    for line in lines:
        groups.setdefault((_NUMBER.sub("#", line.path), line.cells), []).append(line)
    found: list[_Line] = []
    for group in groups.values():
        found += _merged(group)
    return found


def _merged(group: list[_Line]) -> list[_Line]:
    if len(group) == 1:
        return group
    keys = [tuple(map(int, _NUMBER.findall(line.path))) for line in group]
    choices = [sorted(set(column)) for column in zip(*keys, strict=True)]
    whole = 1
    for choice in choices:
        whole *= len(choice)
    if whole == len(group):
        return [_stack(group, choices)]
    # Not a full grid, such as the first layer of every second block: one row for each value of the
    # column with the fewest.
    at = min(
        (i for i, choice in enumerate(choices) if len(choice) > 1), key=lambda i: len(choices[i])
    )
    parts: dict[int, list[_Line]] = {}
    for key, line in zip(keys, group, strict=True):
        parts.setdefault(key[at], []).append(line)
    return [merged for part in parts.values() for merged in _merged(part)]


def _stack(group: list[_Line], choices: list[list[int]]) -> _Line:
    braces = iter(choices)
    path = _NUMBER.sub(lambda _: _brace(next(braces)), group[0].path)
    numbers = [pair for line in group for pair in line.numbers]
    return _Line(f"{path} x{len(group)}", group[0].cells, numbers)


def _brace(numbers: list[int]) -> str:
    """`7`, `{0..11}` or `{0..3,7}`, as a where takes them."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] + 1 == n:
            runs[-1].append(n)
        else:
            runs.append([n])
    told = ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return told if len(numbers) == 1 else "{" + told + "}"


# --- other forms ---------------------------------------------------------------------------------


def plain(sheet: Sheet) -> str:
    """The sheet as text, as wide as it needs."""
    out = io.StringIO()
    show(sheet, Console(file=out, force_terminal=False))
    return out.getvalue()


def show_list(
    heads: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """Prints rows of text under heads; on a non-terminal neither wrapped nor cut."""
    console = Console() if console is None else console
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    width = console.width if console.is_terminal else _ENOUGH
    console.print(table, width=width, crop=False, no_wrap=not console.is_terminal)
