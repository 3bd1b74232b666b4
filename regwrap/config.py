"""Rules in files: TOML and JSON, and the same as plain data. Nothing is imported or evaluated."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from regwrap import terms
from regwrap.errors import PolicyError, RegwrapError
from regwrap.planning import parse_rules
from regwrap.terms import L2SP, ElasticNet, Penalty, Term
from regwrap.where import Where, parse_where

Pairs = list[tuple[object, Term | None]]
Maker = Callable[..., Term | tuple[Term, ...]]

_CLEAR = "none"
_CONDITIONS = ("path", "type", "regex")


def load_rules(path: str | Path) -> Pairs:
    """The rules of a `.toml` or `.json` file, as a list of (where, term) pairs.

    Classes are looked up among the modules that are loaded already; nothing is imported.

    Args:
        path: a file of `[[rule]]` tables, or in JSON `{"rule": [...]}`.

    Raises:
        PolicyError: for a file that is no such thing, naming the file and the rule, from 1.
        OSError: for a file that cannot be read.
    """
    path = Path(path)
    try:
        whole = _READERS[_suffix(path)](path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} is no valid {path.suffix[1:].upper()}: {error}.") from None
    return _read_all(_tables(whole, str(path)), f"{path}, ")


def save_rules(rules: Any, path: str | Path) -> None:
    """Writes rules to a `.toml` or `.json` file that `load_rules` reads.

    Args:
        rules: in any form that `regularize` takes.
        path: `.toml` needs the package tomli-w (`pip install 'regwrap[config]'`), `.json` nothing.

    Raises:
        PolicyError: for what a file cannot hold: a callable, a `Penalty`, an `L2SP` reference.
    """
    path = Path(path)
    write = _WRITERS[_suffix(path)]
    path.write_text(write({"rule": rules_to_dicts(rules)}), encoding="utf-8")


def rules_from_dicts(dicts: Sequence[Mapping[str, Any]]) -> Pairs:
    """Rules as (where, term) pairs from plain data, such as `{"where": "head", "term": "none"}`.

    Args:
        dicts: one mapping a rule: `where`, `term`, and the term's arguments by name.

    Raises:
        PolicyError: naming the rule, from 1.
    """
    if isinstance(dicts, Mapping) or not isinstance(dicts, Sequence) or isinstance(dicts, str):
        raise PolicyError(f"rules_from_dicts needs a list of mappings, one a rule, not {dicts!r}.")
    return _read_all(dicts, "")


def rules_to_dicts(rules: Any) -> list[dict[str, Any]]:
    """Rules as plain data, one dict a term; the inverse of `rules_from_dicts`.

    Args:
        rules: in any form that `regularize` takes.

    Raises:
        PolicyError: for what plain data cannot hold: a callable, a `Penalty`, an `L2SP` reference.
    """
    return [
        {"where": _where_to_data(number, where), **_term_to_data(number, term)}
        for number, (where, term) in enumerate(parse_rules(rules), 1)
    ]


# --- files -------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    if path.suffix not in _READERS:
        raise PolicyError(f"A file of rules ends in .toml or .json, not as {str(path)!r} does.")
    return path.suffix


def _to_toml(whole: Mapping[str, Any]) -> str:
    try:
        import tomli_w
    except ModuleNotFoundError:
        raise RegwrapError(
            "Writing TOML needs the package tomli-w: pip install 'regwrap[config]', or save to a "
            "file that ends in .json."
        ) from None

    def pair(key: str, value: object) -> str:
        if isinstance(value, Mapping):
            return f"{key} = {{ {', '.join(pair(k, v) for k, v in value.items())} }}"
        return tomli_w.dumps({key: value}).strip()

    # Not dumps(whole): it makes one array of inline tables of short rules, a line each.
    tables = ("\n".join(pair(k, v) for k, v in rule.items()) for rule in whole["rule"])
    return "\n".join(f"[[rule]]\n{table}\n" for table in tables) or "rule = []\n"


_READERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
_WRITERS: dict[str, Callable[[Any], str]] = {
    ".toml": _to_toml,
    ".json": lambda whole: json.dumps(whole, indent=2) + "\n",
}


def _tables(whole: object, source: str) -> Sequence[Any]:
    """The tables under the one key that a file has."""
    if not isinstance(whole, Mapping) or "rule" not in whole or len(whole) > 1:
        found = ", ".join(map(repr, whole)) if isinstance(whole, Mapping) else "a list"
        raise PolicyError(
            f"{source} must hold [[rule]] tables (in JSON one object with the key 'rule') and "
            f"nothing else, but has {found or 'nothing'}."
        )
    tables = whole["rule"]
    if not isinstance(tables, list):
        raise PolicyError(f"{source}: 'rule' must be a list of tables; write [[rule]].")
    return tables


# --- reading -----------------------------------------------------------------------------------


def _read_all(tables: Iterable[Any], source: str) -> Pairs:
    return [
        pair
        for number, table in enumerate(tables, 1)
        for pair in _read_rule(table, f"{source}rule {number}")
    ]


def _read_rule(table: Any, at: str) -> Iterator[tuple[object, Term | None]]:
    """One table as its pairs; several for an ElasticNet, which is two terms."""
    if not isinstance(table, Mapping):
        _refuse(at, f"must be a table with where and term, not {table!r}")
    for key, example in (
        ("where", "where = 'head', with \"\" for the whole model"),
        ("term", "term = 'L2', or 'none' to clear"),
    ):
        if key not in table:
            meant = difflib.get_close_matches(key, map(str, table), 1, 0.7)
            told = f" but {meant[0]!r}" if meant else ""
            _refuse(at, f"has no {key!r}{told}; write {example}")
    where = _read_where(table["where"], at)
    arguments = {k: v for k, v in table.items() if k not in ("where", "term")}
    made = _read_term(table["term"], arguments, at)
    for term in made if isinstance(made, tuple) else (made,):
        yield where, term


def _read_where(given: object, at: str) -> object:
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping) or not given:
        _refuse(at, f"where must be a path or a table of path, type and regex, not {given!r}")
    _known(given, _CONDITIONS, f"{at}: where")
    for key, value in given.items():
        if not isinstance(value, str):
            _refuse(at, f"where.{key} must be a string, not {value!r}")
    conditions: dict[str, Any] = dict(given)
    if "type" in given:
        conditions["type"] = _read_class(given["type"], at, "where.type")
    if "regex" in given:
        conditions["regex"] = _read_regex(given["regex"], at)
    # A single condition comes back as what a user writes for it, so that plans compare equal.
    return next(iter(conditions.values())) if len(conditions) == 1 else Where(**conditions)


def _read_regex(pattern: str, at: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        _refuse(at, f"where.regex {pattern!r} is no regular expression: {error}")


def _read_class(dotted: object, at: str, key: str) -> type[nn.Module]:
    """The class of that name among the loaded modules; imports nothing."""
    if not isinstance(dotted, str):
        _refuse(at, f"{key} must be the dotted name of a class, not {dotted!r}")
    found = _look_up(dotted)
    if found is None:
        _refuse(at, f"{key} {dotted!r} is in no module that is loaded{_other_classes(dotted)}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        _refuse(at, f"{key} {dotted!r} is no class of torch.nn.Module")
    return found


def _look_up(dotted: str) -> object:
    parts = dotted.split(".")
    for n in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:n]))
        if found is None:
            continue
        for name in parts[n:]:
            # Not getattr: a package's own __getattr__ may import, as transformers' does.
            found = vars(found).get(name) if hasattr(found, "__dict__") else None
        return found
    return None


def _other_classes(dotted: str) -> str:
    name = dotted.rpartition(".")[2]
    names = {c.__name__: c for c in vars(nn).values() if isinstance(c, type)}
    near = _nearest(name, names)
    told = ", ".join(f"'torch.nn.{n}'" for n in near)
    return f"; import its module first, or take one of {told}" if told else "; import it first"


def _read_term(name: object, arguments: dict[str, Any], at: str) -> Any:
    if not isinstance(name, str):
        _refuse(at, f"term must be a name such as 'L2', or 'none' to clear, not {name!r}")
    if name == _CLEAR:
        _known(arguments, (), f"{at}: a term 'none'")
        return None
    if name == "Penalty":
        _refuse(at, "a Penalty needs a function, which a file cannot hold; add it in Python")
    makers = _makers()
    if name not in makers:
        choices = (*makers, _CLEAR)
        near = _nearest(name, choices) or choices
        _refuse(at, f"knows no term {name!r}; write {_either(near)}")
    return _make(name, makers[name], arguments, at)


def _makers() -> dict[str, Maker]:
    """What makes terms, by name; a class without a required argument is no term but a base."""
    found: dict[str, Maker] = {"ElasticNet": ElasticNet}
    for name, cls in vars(terms).items():
        is_term = isinstance(cls, type) and issubclass(cls, Term) and dataclasses.is_dataclass(cls)
        if is_term and cls is not Penalty and _required(cls):
            found[name] = cls
    return found


def _required(maker: Maker) -> list[str]:
    named = inspect.signature(maker).parameters.values()
    return [p.name for p in named if p.default is inspect.Parameter.empty]


def _make(name: str, maker: Maker, arguments: dict[str, Any], at: str) -> Any:
    _known(arguments, list(inspect.signature(maker).parameters), f"{at}: {name}")
    missing = [n for n in _required(maker) if n not in arguments]
    if missing:
        _refuse(at, f"{name} needs {missing[0]!r}; write {missing[0]} = 0.1 with your number")
    if "reference" in arguments:
        _refuse(at, "an L2SP's reference is tensors, which a file cannot hold; leave it out")
    values = {key: _read_value(value) for key, value in arguments.items()}
    if "kind" in values:
        values["kind"] = _read_class(values["kind"], at, "kind")
    try:
        return maker(**values)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{at}: {str(error).rstrip('.')}{_unquoted(values)}.") from None


def _read_value(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _unquoted(values: Mapping[str, object]) -> str:
    """What to write for a number that stands in quotes."""
    for key, value in values.items():
        if isinstance(value, str) and _is_number(value):
            return f"; write {key} = {value}, without quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _known(given: Iterable[str], names: Sequence[str], at: str) -> None:
    for key in given:
        if key not in names:
            near = _nearest(str(key), names) or list(names)
            told = f"; write {_either(near)}" if near else " and takes nothing else"
            raise PolicyError(f"{at} has no {key!r}{told}.")


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    by_lower = {n.lower(): n for n in names}
    return [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, 3, 0.5)]


def _either(names: Sequence[str]) -> str:
    quoted = [repr(n) for n in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _refuse(at: str, why: str) -> NoReturn:
    raise PolicyError(f"{at}: {why}.")


# --- writing -----------------------------------------------------------------------------------


def _where_to_data(number: int, sugar: object) -> str | dict[str, str]:
    where = parse_where(sugar)
    at = f"rule {number}"
    if where.predicate is not None:
        _refuse(at, f"{sugar!r} is a callable, which a file cannot hold; write a path or a regex")
    data: dict[str, str] = {}
    if where.path is not None:
        data["path"] = where.path
    if where.type is not None:
        data["type"] = _class_to_data(where.type, at)
    if where.regex is not None:
        data["regex"] = _pattern(where.regex)
    return data["path"] if list(data) == ["path"] else data


def _pattern(regex: re.Pattern[str]) -> str:
    """The pattern with its flags written in it: `(?i)...`."""
    extra = regex.flags & ~re.compile(regex.pattern).flags
    letters = "".join(c for c in "aimsx" if extra & getattr(re, c.upper()))
    return f"(?{letters}){regex.pattern}" if letters else regex.pattern


def _class_to_data(cls: type[nn.Module], at: str) -> str:
    public = vars(nn).get(cls.__name__) is cls
    dotted = f"torch.nn.{cls.__name__}" if public else f"{cls.__module__}.{cls.__qualname__}"
    if _look_up(dotted) is not cls:
        _refuse(at, f"{cls!r} is not found under its name; define it at the top level of a module")
    return dotted


def _term_to_data(number: int, term: Term | None) -> dict[str, Any]:
    at = f"rule {number}"
    if term is None:
        return {"term": _CLEAR}
    if isinstance(term, Penalty) or type(term).__name__ not in _makers():
        _refuse(at, f"{term!r} needs Python code, which a file cannot hold; add it in Python")
    if isinstance(term, L2SP) and term.reference is not None:
        _refuse(at, "an L2SP's reference is tensors, which a file cannot hold; leave it out")
    fields = dataclasses.fields(term)  # type: ignore[arg-type]  # every concrete term is one
    values = ((f.name, getattr(term, f.name), f.default) for f in fields)
    told = {
        name: _value_to_data(value, at)
        for name, value, default in values
        if default is dataclasses.MISSING or value != default
    }
    return {"term": type(term).__name__, **dict(sorted(told.items(), key=_required_first(term)))}


def _required_first(term: Term) -> Callable[[tuple[str, Any]], bool]:
    required = _required(type(term))
    return lambda item: item[0] not in required


def _value_to_data(value: object, at: str) -> object:
    if isinstance(value, type):
        return _class_to_data(value, at)
    return list(value) if isinstance(value, tuple) else value
