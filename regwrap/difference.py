"""What became of a policy's sites in another version of the model: lost, new, renamed, changed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

_COMPARED = ("layer", "shape", "parameters", "term", "mechanism")


@dataclass(frozen=True)
class Change:
    """One site that is not as it was."""

    change: str
    """`"lost"`, `"new"`, `"renamed"` or `"changed"`."""
    path: str
    """The site now; of a lost one, as it was."""
    was: str | None
    """What a renamed site was called; None for the others."""
    term: str | None
    detail: str


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Every site that the rows of two policies do not have alike, in module order.

    A site that is gone under one name and there under another, of the same layer, shape and terms,
    is renamed: to the one whose numbers and name are the most alike, else to the first in order.
    """
    old, new = _sites(before), _sites(after)
    lost = {name: rows for name, rows in old.items() if name not in new}
    added = {name: rows for name, rows in new.items() if name not in old}
    renamed = _renamed(lost, added)
    moved = set(renamed.values())
    return [
        *(_change("lost", n, rows, _left(n, new)) for n, rows in lost.items() if n not in renamed),
        *(_change("renamed", renamed[n], lost[n], f"was {n}", n) for n in lost if n in renamed),
        *(_change("new", n, r, _unruled(r)) for n, r in added.items() if n not in moved),
        *(
            _change("changed", n, new[n], told)
            for n in old
            if n in new and (told := _differences(old[n], new[n]))
        ),
    ]


def _sites(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each site: `path.weight`, `path:call`, or the path of a layer without any."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        site = row["site"]
        plain = site in (None, "call", "output")
        tail = f":{site}" if plain else (f".{site}" if row["path"] else site)
        name = row["path"] if site is None else f"{row['path']}{tail}"
        found.setdefault(name or "(model)", []).append(row)
    return found


def _change(change: str, name: str, rows: list[Row], detail: str, was: str | None = None) -> Change:
    terms = [row["term"] for row in rows if row["term"] is not None]
    return Change(change, name, was, " + ".join(terms) or None, detail)


def _left(name: str, new: Mapping[str, list[Row]]) -> str:
    """Whether the layer of a lost site is still there."""
    layer = re.split(r"[:]|\.[^.]*$", name)[0]
    still = layer in new or any(n.startswith((f"{layer}.", f"{layer}:")) for n in new)
    return f"{layer} is there, no rule reaches it so" if still else "no such layer"


def _unruled(rows: list[Row]) -> str:
    return "" if rows[0]["term"] is not None else "no rule reaches it"


def _differences(old: list[Row], new: list[Row]) -> str:
    told = []
    for key in _COMPARED:
        was, now = ([_plain(row[key]) for row in rows] for rows in (old, new))
        if was != now:
            told.append(f"{key} {_shown(was)} -> {_shown(now)}")
    return "; ".join(told)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value  # JSON knows no tuples


def _shown(values: list[Any]) -> str:
    texts = ("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)
    return " + ".join(dict.fromkeys(texts))


def _renamed(lost: Mapping[str, list[Row]], added: Mapping[str, list[Row]]) -> dict[str, str]:
    """Lost names with the new name of each, no name twice."""
    by_looks: dict[Any, list[str]] = {}
    for name, rows in added.items():
        by_looks.setdefault(_looks(rows), []).append(name)
    found = {}
    for name, rows in lost.items():
        candidates = by_looks.get(_looks(rows), [])
        if candidates:
            found[name] = max(candidates, key=lambda other: _likeness(name, other))
            candidates.remove(found[name])
    return found


def _looks(rows: list[Row]) -> tuple[Any, ...]:
    return tuple(tuple(_plain(row[key]) for key in ("site", *_COMPARED)) for row in rows)


def _likeness(a: str, b: str) -> tuple[bool, float]:
    """Equal numbers first, then like names; of names alike or unlike, the first in order wins."""
    (numbers_a, name_a), (numbers_b, name_b) = _parts(a), _parts(b)
    ratio = difflib.SequenceMatcher(None, name_a, name_b, autojunk=False).ratio()
    return numbers_a == numbers_b, ratio if ratio > _ALIKE else 0


_ALIKE = 0.6  # below it the letters that two names share are chance


def _parts(site: str) -> tuple[list[str], str]:
    """The numbers in a path, and the layer's own name."""
    parts = re.split(r"[.:]", site)
    names = [part for part in parts if not part.isdigit()]
    return [part for part in parts if part.isdigit()], names[-2] if len(names) > 1 else names[-1]
