"""Selectors: which modules and parameters a rule means."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from torch import nn

from regwrap.errors import brief

Predicate = Callable[[str, nn.Module], bool]

_BRACES = re.compile(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
# A component no module has: a regex that accepts it in last place accepts anything there. Of
# letters, so that `\w+` counts as anything too.
_PROBE = "zzregwrapprobe"


@dataclass(frozen=True)
class Where:
    """Selects what fulfils all of its conditions; at least one is required.

    Args:
        path: a dotted path with globs by component: `*` one component, `**` any number,
            `{0..11}` and `{q,v}` alternatives; nothing else is special. `""` is the model.
        type: a class of `nn.Module`, tested by `isinstance`.
        regex: a pattern that has to match the whole path.
        predicate: `(path, module) -> bool`.

    Raises:
        TypeError: for a condition of another type, or none at all.
    """

    path: str | None = None
    type: type[nn.Module] | None = dataclass_field(default=None, kw_only=True)
    regex: re.Pattern[str] | None = dataclass_field(default=None, kw_only=True)
    predicate: Predicate | None = dataclass_field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.regex, str):
            object.__setattr__(self, "regex", _compiled(self.regex))
        _check("path", self.path, isinstance(self.path, str), "a string")
        _check("type", self.type, _is_module_class(self.type), "a class of nn.Module")
        _check("regex", self.regex, _is_text_pattern(self.regex), "a pattern of text")
        _check("predicate", self.predicate, callable(self.predicate), "a callable")
        if all(v is None for v in (self.path, self.type, self.regex, self.predicate)):
            raise TypeError("Where needs a condition; write Where('') for the whole model.")

    def selects_module(self, path: str, module: nn.Module) -> bool:
        """Whether the module at `path` is meant (what lies beneath it is reached besides)."""
        return (
            (self.path is None or compile_glob(self.path).fullmatch(path) is not None)
            and (self.regex is None or self.regex.fullmatch(path) is not None)
            and (self.type is None or isinstance(module, self.type))
            and (self.predicate is None or bool(self.predicate(path, module)))
        )

    def selects_parameter(self, path: str, owner: str, module: nn.Module) -> bool:
        """Whether the parameter at `path` is meant by its own name.

        A pattern that ends in a wildcard names modules, never parameters; so does a regex that
        accepts any last component.
        """
        if self.path is None and self.regex is None:
            return False
        return (
            (self.path is None or self._glob_names(path))
            and (self.regex is None or self._regex_names(path, owner))
            and (self.type is None or isinstance(module, self.type))
            and (self.predicate is None or bool(self.predicate(owner, module)))
        )

    def names_layer(self) -> bool:
        """Whether a selected module is named itself: by a last component or class of its own.

        `""` names no layer, also where the model is one.
        """
        if self.path is not None:
            return self.path != "" and "*" not in _components(self.path)[-1]
        return self.type is not None and self.type is not nn.Module

    def _glob_names(self, path: str) -> bool:
        assert self.path is not None
        if set(_components(self.path)[-1]) == {"*"}:
            return False
        return compile_glob(self.path).fullmatch(path) is not None

    def _regex_names(self, path: str, owner: str) -> bool:
        assert self.regex is not None
        anything = f"{owner}.{_PROBE}" if owner else _PROBE
        return self.regex.fullmatch(path) is not None and not self.regex.fullmatch(anything)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"Where: regex {text!r} is no regular expression: {error}.") from error


def _is_text_pattern(value: object) -> bool:
    return isinstance(value, re.Pattern) and isinstance(value.pattern, str)


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _check(name: str, value: object, fits: bool, wanted: str) -> None:
    if value is not None and not fits:
        raise TypeError(f"Where: {name} must be {wanted}, not {brief(value)}.")


def parse_where(sugar: object) -> Where:
    """A rule's left side as a `Where`; a TypeError names what may stand there."""
    if isinstance(sugar, Where):
        return sugar
    if isinstance(sugar, str):
        return Where(sugar)
    if isinstance(sugar, re.Pattern):
        return Where(regex=sugar)
    if _is_module_class(sugar):
        return Where(type=sugar)  # type: ignore[arg-type]
    if callable(sugar) and not isinstance(sugar, type | nn.Module):
        return Where(predicate=sugar)
    raise TypeError(
        "A rule's where must be a path, a compiled regex, a class of nn.Module, a callable "
        f"(path, module) -> bool or a Where, not {brief(sugar)} of type {type(sugar).__name__}."
    )


@functools.lru_cache(maxsize=1024)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """The pattern as a regex over whole paths; see `Where`."""
    # "a.**.**" is "a.**": two in a row would each ask for a dot of their own
    split = _components(pattern)
    components = [c for i, c in enumerate(split) if not (i and c == split[i - 1] == "**")]
    text = ""
    for i, component in enumerate(components):
        last = i == len(components) - 1
        if component != "**":
            text += _component_regex(component) + ("" if last else r"\.")
        elif last:
            # the dot before it is part of what may be absent: "a.**" reaches "a" itself
            text = text.removesuffix(r"\.") + (r"(?:\.[^.]+)*" if text else ".*")
        else:
            text += r"(?:[^.]+\.)*"
    return re.compile(text)


@functools.lru_cache(maxsize=1024)
def _components(pattern: str) -> tuple[str, ...]:
    """The pattern split at dots, those inside special braces excepted."""
    braces = [m.group() for m in _BRACES.finditer(pattern)]
    held = iter(braces)
    split = _BRACES.sub("\0", pattern).split(".")
    return tuple(re.sub("\0", lambda _: next(held), c) for c in split)


def _component_regex(component: str) -> str:
    text, start = "", 0
    for match in _BRACES.finditer(component):
        text += _stars(component[start : match.start()]) + _alternatives(match.group(1))
        start = match.end()
    text += _stars(component[start:])
    return r"[^.]+" if set(component) == {"*"} else text


def _stars(text: str) -> str:
    return r"[^.]*".join(re.escape(part) for part in re.split(r"\*+", text))


def _alternatives(content: str) -> str:
    choices: list[str] = []
    for item in content.split(","):
        if span := _RANGE.fullmatch(item):
            low, high = sorted((int(span[1]), int(span[2])))
            choices += map(str, range(low, high + 1))
        else:
            choices.append(_stars(item))
    return f"(?:{'|'.join(choices)})"


def recorded(sugar: object) -> object:
    """What a policy keeps of a where: the object, or its text if another process cannot find it."""
    if isinstance(sugar, Where):
        inner = (sugar.type, sugar.predicate)
        return sugar if all(v is None or _importable(v) for v in inner) else shown(sugar)
    if isinstance(sugar, str | re.Pattern) or _importable(sugar):
        return sugar
    return shown(sugar)


def _importable(value: Any) -> bool:
    found: Any = sys.modules.get(getattr(value, "__module__", ""))
    for name in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is value


def shown(sugar: object) -> str:
    """A where as one short text, for tables and messages."""
    if isinstance(sugar, str):
        return sugar
    if isinstance(sugar, re.Pattern):
        return f"re.compile({sugar.pattern!r})"
    if isinstance(sugar, Where):
        values = ((n, getattr(sugar, n)) for n in ("path", "type", "regex", "predicate"))
        told = [f"{n}={v if n != 'path' else repr(v)}" for n, v in _told(values)]
        return f"Where({', '.join(told)})"
    if isinstance(sugar, type):
        public = getattr(nn, sugar.__name__, None) is sugar
        return f"nn.{sugar.__name__}" if public else sugar.__qualname__
    code = getattr(sugar, "__code__", None)
    name = getattr(sugar, "__qualname__", type(sugar).__qualname__)
    return f"{name} (line {code.co_firstlineno})" if code and "<lambda>" in name else name


def _told(values: Any) -> list[tuple[str, str]]:
    return [(n, shown(v)) for n, v in values if v is not None]
