"""Rows as a rich table. The only module that imports rich; it knows nothing of models."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Figures = tuple[float | None, float]
"""A site's 2-norm, of an output none, and its penalty."""

CONVENTION = "L2(s) = s/2 * sum(w^2)"
_ROOT = "(model)"
_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")
_NUMBERED = re.compile(r"(?<=\.)(0|[1-9]\d*)(?=\.)")  # of a path within a sentence
_ENOUGH = 100_000  # columns; nothing is that wide


@dataclass(frozen=True)
class Sheet:
    """What a table shows: the rows of a policy and the figures around them."""

    rows: Sequence[Row]
    counts: Sequence[Row] = ()
    footer: Sequence[str] = ()
    shapes: Mapping[str, object] = field(default_factory=dict)
    """What a layer's parameters are shaped as, by its path: layers that differ do not collapse."""
    decay: Mapping[str, str] | None = None
    """Weight decay by layer path."""
    values: Mapping[tuple[str, str], Figures] | None = None
    """2-norm and penalty by layer path and site."""
    collapse: bool = True


@dataclass(frozen=True)
class _Line:
    """One row a layer, or one for a stack of layers that look the same."""

    path: str
    layer: str
    shape: str
    acts: tuple[_Act, ...]
    decay: str
    note: str
    shapes: object
    numbers: tuple[Figures, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class _Act:
    """A term that acts on a layer."""

    site: str
    term: str
    mechanism: str
    rule: str


def show(sheet: Sheet, console: Console | None = None) -> None:
    """Prints the sheet; on a non-terminal as wide as it needs, neither wrapped nor cut."""
    _print(draw(sheet), Console() if console is None else console)


def _print(drawn: RenderableType, console: Console) -> None:
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


def draw(sheet: Sheet) -> Drawing:
    """The table, its footer and a line a rule, for any console."""
    return Drawing(sheet)


def _natural_width(drawn: RenderableType, console: Console) -> int:
    options = console.options.update(max_width=_ENOUGH)
    return Measurement.get(console, options, drawn).maximum


class Drawing:
    """The sheet as rich draws it: on one line a layer where there is room, narrower where not."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.lines = _lines(sheet)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        parts = (*self._around(options, wide=True), self._table(options, _WIDE))
        widest = max(Measurement.get(console, options, part).maximum for part in parts)
        return Measurement(min(20, widest), widest)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def fits(part: Any) -> bool:
            # the table may not shrink itself to fit before we have seen how wide it wants to be
            unbound = options.update(max_width=_ENOUGH)
            return Measurement.get(console, unbound, part).maximum <= options.max_width

        layouts = (_WIDE, *_NARROW)
        chosen = next((x for x in layouts if fits(self._table(options, x))), _NARROW[-1])
        yield self._table(options, chosen)
        wide = all(map(fits, self._around(options, wide=True)))
        yield from self._around(options, wide=wide)
        if chosen.without:
            told = f"{options.max_width} columns: {', '.join(chosen.without)} left out"
            yield Text(f"\n({told})", style="dim")

    def _table(self, options: ConsoleOptions, layout: _Layout) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
        heads = ["layer", "type", "shape", "terms", "mechanism", "rule"]
        heads += ["weight decay"] if self.sheet.decay is not None else []
        heads += ["norm2", "penalty"] if self.sheet.values is not None else []
        heads = [head for head in heads if head not in layout.without]
        for head in heads:
            right = head in ("norm2", "penalty")
            table.add_column(head, justify="right" if right else "left", overflow="fold")
        for line in self.lines:
            cells = _cells(line, layout)
            texts = (_text(cells[head], options) for head in heads)
            table.add_row(*texts, style=None if line.acts else "dim")
        return table

    def _around(self, options: ConsoleOptions, *, wide: bool) -> Iterator[RenderableType]:
        """What stands beneath the table."""
        if notes := [(line.path or _ROOT, line.note) for line in self.lines if line.note]:
            yield Text("")
            yield _grid([(f"{path}:", note) for path, note in notes], options, style="italic")
        yield Text("")
        yield from (_text(line, options) for line in self.sheet.footer)
        if self.sheet.counts:
            yield Text("")
            rows = [_rule(count) for count in self.sheet.counts]
            if not wide:
                rows = [(rule, f"{where}: {term}\n{told}") for rule, where, term, told in rows]
            yield _grid(rows, options)


@dataclass(frozen=True)
class _Layout:
    """How narrow a table is."""

    stacked: bool = False
    """A line a term, its mechanism and rule beside it, instead of a line a layer."""
    path: int = _ENOUGH
    """How wide a path may be before it is broken at a dot."""
    without: tuple[str, ...] = ()
    """Columns left out."""


_WIDE = _Layout()
_LESS_AND_LESS = ("type", "shape", "mechanism", "rule")
_NARROW = (
    *(_Layout(True, width, _LESS_AND_LESS[:n]) for n in range(5) for width in (32, 24)),
    _Layout(True, 16, _LESS_AND_LESS),
)


def _text(value: str, options: ConsoleOptions) -> Text:
    """A text as it stands, without markup; in ASCII for an ASCII console."""
    return Text("".join(c if c.isascii() or not options.ascii_only else _code(c) for c in value))


def _printable(value: str) -> str:
    """The text without what moves the cursor: a module may be named as one likes."""
    return "".join(c if c.isprintable() else _code(c) for c in value)


def _code(c: str) -> str:
    return c.encode("unicode_escape").decode()


def _cells(line: _Line, layout: _Layout) -> dict[str, str]:
    """The line's cells by column."""
    norm2, penalty = _figures(line.numbers)
    if layout.stacked:
        norm2 = norm2.replace(" .. ", " ..\n")
    cells = {
        "layer": _broken(line.path or _ROOT, layout.path),
        "type": line.layer,
        "shape": line.shape,
        "weight decay": line.decay.replace(", ", "\n") if layout.stacked else line.decay,
        "norm2": norm2,
        "penalty": penalty,
    }
    return cells | (_stacked(line.acts) if layout.stacked else _in_line(line.acts))


def _in_line(acts: Sequence[_Act]) -> dict[str, str]:
    """`L1(0.1) + L2(0.2), bias: L2(0.3)`: the weight's and the call's terms need no name."""
    by_site: dict[str, list[str]] = {}
    for act in acts:
        by_site.setdefault(act.site, []).append(act.term)
    terms = (f"{_label(site)} {' + '.join(ts)}".lstrip() for site, ts in by_site.items())
    return {
        "terms": ", ".join(terms),
        "mechanism": ", ".join(dict.fromkeys(act.mechanism for act in acts)),
        "rule": ", ".join(sorted({act.rule for act in acts if act.rule}, key=int)),
    }


def _stacked(acts: Sequence[_Act]) -> dict[str, str]:
    """A line a term, after a line for a site that needs its name."""
    rows: list[tuple[str, str, str]] = []
    for site, group in itertools.groupby(acts, key=lambda act: act.site):
        label = _label(site)
        rows += [(label, "", "")] if label else []
        rows += [(f"  {a.term}" if label else a.term, a.mechanism, a.rule) for a in group]
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return dict(zip(("terms", "mechanism", "rule"), map("\n".join, columns), strict=True))


def _label(site: str) -> str:
    return "" if site in ("weight", "call") else f"{site}:"


def _broken(path: str, width: int) -> str:
    """The path on several lines of this width, broken at dots (not at those of `{0..11}`)."""
    lines = [""]
    for part in re.split(r"(?<=\.)(?![^{]*\})(?!\.)", path):
        if lines[-1].strip() and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _figures(numbers: Sequence[Figures]) -> tuple[str, str]:
    """The norms' range and the penalties' sum."""
    norms = sorted(norm for norm, _ in numbers if norm is not None)
    ends = dict.fromkeys(f"{norm:.4g}" for norm in (*norms[:1], *norms[-1:]))
    return " .. ".join(ends), f"{sum(p for _, p in numbers):.4g}" if numbers else ""


def _grid(rows: Sequence[tuple[str, ...]], options: ConsoleOptions, style: str = "") -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in rows[0]:
        grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*(_text(cell, options) for cell in row), style=style)
    return grid


def _rule(count: Row) -> tuple[str, ...]:
    told = f"{_many(count['layers'], 'layer')}, {_many(count['entries'], 'entry', 'entries')}"
    told += f", {count['overridden']} overridden" if count["overridden"] else ""
    where, term = str(count["where"]) or _ROOT, str(count["term"] or "None (clears)")
    return f"rule {count['rule']}", _printable(where), _printable(term), told


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
    notes = dict.fromkeys(row["note"] for row in rows if row["note"])
    values = sheet.values or {}
    sites = dict.fromkeys((path, row["site"]) for row in acting)
    return _Line(
        path=_printable(path),
        layer=_printable(rows[0]["layer"]),
        shape=", ".join(shapes),
        acts=tuple(map(_act, acting)),
        decay=(sheet.decay or {}).get(path, ""),
        note=_printable("; ".join(notes)),
        shapes=sheet.shapes.get(path),
        numbers=tuple(values[site] for site in sites if site in values),
    )


def _act(row: Row) -> _Act:
    rule = "" if row["rule"] is None else str(row["rule"])
    term, site = _printable(row["term"]), _printable(row["site"])
    return _Act(site, term, row["mechanism"] or "none", rule)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


# --- collapsing numbered stacks ----------------------------------------------------------------


def _collapse(lines: list[_Line]) -> list[_Line]:
    """Lines that differ in their paths' numbers alone become one: `blocks.{0..11}.fc1 x12`."""
    groups: dict[_Line, list[_Line]] = {}
    for line in lines:
        note = _NUMBERED.sub("#", line.note)
        alike = replace(line, path=_NUMBER.sub("#", line.path), note=note)
        groups.setdefault(alike, []).append(line)
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
        return [_stack(group)]
    # Not a full grid, such as the first layer of every second block: one row for each value of the
    # column with the fewest.
    at = min(
        (i for i, choice in enumerate(choices) if len(choice) > 1), key=lambda i: len(choices[i])
    )
    parts: dict[int, list[_Line]] = {}
    for key, line in zip(keys, group, strict=True):
        parts.setdefault(key[at], []).append(line)
    return [merged for part in parts.values() for merged in _merged(part)]


def _stack(group: list[_Line]) -> _Line:
    path = _spanned(_NUMBER, [line.path for line in group])
    note = _spanned(_NUMBERED, [line.note for line in group])
    numbers = tuple(pair for line in group for pair in line.numbers)
    return replace(group[0], path=f"{path} x{len(group)}", note=note, numbers=numbers)


def _spanned(number: re.Pattern[str], texts: list[str]) -> str:
    """Texts that differ in their numbers alone as one, with braces for the numbers."""
    columns = zip(*(map(int, number.findall(text)) for text in texts), strict=True)
    braces = [_brace(sorted(set(column))) for column in columns]
    return number.sub(lambda _: braces.pop(0), texts[0])


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


def draw_checks(checks: Iterable[tuple[str, bool, str]]) -> Group:
    """A line a check, and how many passed."""
    checks = list(checks)
    grid = Table.grid(padding=(0, 2))
    for _ in range(3):
        grid.add_column(overflow="fold")
    for name, ok, detail in checks:
        state = Text("ok", style="green") if ok else Text("FAILED", style="bold red")
        grid.add_row(state, Text(name), Text(detail))
    passed = sum(ok for _, ok, _ in checks)
    return Group(grid, Text(f"{passed} of {len(checks)} checks passed"))


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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _print(table, Console() if console is None else console)
