"""What a class has: its methods, and the words that they use."""

from __future__ import annotations

import types
import weakref
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from regwrap.graph.names import (
    LIMIT,
    MADE,
    code_named,
    functions_behind,
    is_from,
    is_library,
    is_trusted,
    said_by,
    spoken_by,
)
from regwrap.graph.source import word_set


def _own_classes(cls: type) -> list[type]:
    """The class and its bases that add something to `nn.Module`."""
    bases = (k for k in cls.__mro__ if k not in nn.Module.__mro__ and not is_made_here(k))
    return [k for k in bases if not is_from(k, _FRAMES)]


_FRAMES = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.utils",
)
"""Where transformers' base classes live: what they say of layers is never a call of one."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _own_attributes(cls: type) -> list[tuple[str, object]]:
    # Of torch's containers only what runs by itself: their indexing is known.
    return [(n, v) for n, v in vars(cls).items() if cls not in _CONTAINERS or n == "forward"]


def is_made_here(cls: type) -> bool:
    """Whether the class was made by this package, on top of an author's."""
    return MADE in vars(cls) or cls.__module__.split(".")[0] == "regwrap"


@dataclass(frozen=True, slots=True)
class Member:
    """A function of a class; `plain`: it is an ordinary method.

    Its key is its name, or, for one that a subclass has overridden, `name@module.Class`.
    """

    name: str
    key: str
    functions: tuple[types.FunctionType, ...]
    plain: bool
    visible: bool

    @property
    def said(self) -> frozenset[str]:
        """The words that its code uses."""
        return frozenset().union(*map(said_by, self.functions))


def members_of(cls: type) -> list[Member]:
    """The methods and properties of a class, each with every definition that may run."""
    found: list[Member] = []
    taken: set[str] = set()
    for klass in _own_classes(cls):
        for name, value in _own_attributes(klass):
            if functions := functions_behind(value):
                plain = isinstance(value, types.FunctionType)
                key = key_of(name, klass) if name in taken else name
                found.append(Member(name, key, tuple(functions), plain, name not in taken))
            taken.add(name)
    return found


def key_of(name: str, klass: type) -> str:
    """What one definition of a method is called, whichever class reads it."""
    return f"{name}@{klass.__module__}.{klass.__qualname__}"


@dataclass(frozen=True, slots=True)
class _ClassWords:
    """For each name that a class defines, what its code says; no reference to the class."""

    members: Mapping[str, frozenset[str]]
    by_key: Mapping[str, frozenset[str]]
    stamp: tuple[weakref.ref[types.CodeType], ...]
    """The code of its functions and of the global functions that they name, as it is now."""

    def live(self, roots: Iterable[str]) -> frozenset[str]:
        """The members that these reach, by name."""
        todo = [r for r in roots if r in self.members]
        seen = set(todo)
        while todo:
            new = (self.members[todo.pop()] & self.members.keys()) - seen
            seen |= new
            todo += new
        return frozenset(seen)

    def said(self, roots: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(self.members[m] for m in roots))


_WORDS: weakref.WeakKeyDictionary[type, _ClassWords] = weakref.WeakKeyDictionary()
NOT_RUN = word_set(
    "__init__ __new__ __init_subclass__ __repr__ __str__ __deepcopy__ __copy__ __reduce__ "
    "__reduce_ex__ __getstate__ __setstate__ __del__ __post_init__ __set_name__"
)


def roots_of(members: Iterable[str]) -> list[str]:
    """The members that run without being named: forward and the special methods."""
    return [m for m in members if m == "forward" or (_is_special(m) and m not in NOT_RUN)]


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def words_of(cls: type) -> _ClassWords:
    """The words of a class as `read_words` found them last."""
    return _WORDS[cls]


def read_words(classes: Iterable[type]) -> None:
    """Reads classes anew: somebody may have replaced a method, or a function that it calls."""
    for cls in classes:
        members: dict[str, frozenset[str]] = {}
        by_key: dict[str, frozenset[str]] = {}
        stamp: dict[types.FunctionType, None] = {}
        for member in members_of(cls):
            functions = _with_global_functions(member.functions)
            words = frozenset[str]().union(*map(said_by, functions))
            members[member.name] = members.get(member.name, frozenset()) | words
            by_key[member.key] = words
            stamp |= functions
        codes = tuple(weakref.ref(f.__code__) for f in stamp)
        _WORDS[cls] = _ClassWords(members, by_key, codes)


def _with_global_functions(
    functions: Iterable[types.FunctionType],
) -> dict[types.FunctionType, None]:
    """Functions and those that they name, and so on, of the model's author.

    Of classes that they name, what is written in the class: `Base.forward(self, x)`.
    """
    todo = list(functions)
    seen: dict[types.FunctionType, None] = dict.fromkeys(todo)
    while todo and len(seen) < LIMIT:
        function = todo.pop()
        for value in code_named(function, spoken_by(function.__code__)):
            for item in _functions_of(value):
                if item not in seen and not is_trusted(item):
                    seen[item] = None
                    todo.append(item)
    return seen


def functions_run(cls: type, members: Container[str]) -> dict[types.FunctionType, None]:
    """The functions of these members of a class, and those that they name, and so on."""
    own = (f for m in members_of(cls) if m.name in members for f in m.functions)
    return _with_global_functions(own)


def _functions_of(code: object) -> list[types.FunctionType]:
    if not isinstance(code, type):
        return [code] if isinstance(code, types.FunctionType) else []
    if not issubclass(code, nn.Module) and is_library(code.__module__):
        return []
    found = (v for n, v in vars(code).items() if n not in NOT_RUN)
    return [f for v in found for f in functions_behind(v)]
