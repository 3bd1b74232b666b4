"""What the code of one owner does with the layers beneath it."""

from __future__ import annotations

import inspect
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from regwrap.graph.classes import (
    NOT_RUN,
    Member,
    is_made_here,
    key_of,
    members_of,
    read_words,
    roots_of,
    words_of,
)
from regwrap.graph.names import (
    EVERYTHING,
    FORBIDDEN,
    INTROSPECTION,
    NOTHING,
    Names,
    is_trusted,
    names_of,
    spoken_by,
)
from regwrap.graph.questions import calls_of, described
from regwrap.graph.reach import Doubt, Reaching
from regwrap.graph.source import definition_of
from regwrap.graph.syntax import Scope, locals_of, refuse_private
from regwrap.graph.tracer import Tracer
from regwrap.graph.verdicts import Call, Refused
from regwrap.graph.view import Token, View, is_indexed, is_stock_sequential


@dataclass(frozen=True, slots=True)
class Facts:
    """What the code of one owner does with the modules beneath it; plain data."""

    calls: tuple[Call, ...]
    doubts: tuple[Doubt, ...]
    supers: tuple[tuple[str, str], ...] = ()
    """Which method calls which overridden one by `super()`, by their keys."""
    written: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Room for what is made from these facts, for every owner that they hold for."""

    def doubt_of(self, owner: nn.Module, child: str) -> str:
        """The same for a child of an owner that they hold for."""
        local, anchor = _name_of(owner, child)
        return self.doubt(child, local, anchor)

    def doubt(self, leaf: str, local: str, anchor: str) -> str:
        """Why a call of this module may be unseen; `""` if there is no doubt."""
        return next((d.reason for d in self.doubts if d.concerns(leaf, local, anchor)), "")


def facts_about(owner: nn.Module, children: Iterable[str]) -> Facts:
    """What the owner's code does with these modules beneath it, as far as itself can tell."""
    with LOCK:
        read_words([type(owner)])
    words = words_of(type(owner))
    interest = {_name_of(owner, child)[0] for child in children}
    return facts(owner, frozenset(interest), words.live(roots_of(words.members)))


def _name_of(owner: nn.Module, child: str) -> tuple[str, str]:
    """What a module beneath the owner is reached by, and the path of what has that name."""
    names = child.split(".")
    view = View(owner)
    end = len(names)
    while end > 0 and is_indexed(view.module(".".join(names[: end - 1]))):
        end -= 1
    return (names[end - 1] if end else ""), ".".join(names[:end])


def method_of(cls: type, key: str) -> types.FunctionType:
    """The class's own plain method of this key, beneath any rewrite."""
    name = key.split("@")[0]
    for klass in cls.__mro__:
        if name in vars(klass) and not is_made_here(klass) and key in (name, key_of(name, klass)):
            found = vars(klass)[name]
            if isinstance(found, types.FunctionType):
                return found
            break
    raise Refused(f"{name} is no plain method")


def trace(owner: nn.Module, method: str = "forward") -> fx.Graph:
    """A method of one owner as a graph, every child a leaf.

    Raises:
        Refused: the method is not provably what a graph can say.
    """
    function = method_of(type(owner), method)
    if method in vars(owner):
        raise Refused(f"{method} was replaced on the instance")
    try:
        return Tracer(View(owner), function).write()
    except Refused as error:
        raise Refused(f"{method} {error}") from None


_Key = tuple[frozenset[str], frozenset[str], tuple[weakref.ref[types.CodeType], ...]]
_Known = tuple[_Key, dict[tuple[str, str], Token], Facts]
LOCK = threading.RLock()
_LAYOUTS = 64
FACTS: weakref.WeakKeyDictionary[type, list[_Known]] = weakref.WeakKeyDictionary()


def facts(owner: nn.Module, interest: frozenset[str], live: frozenset[str]) -> Facts:
    """What the owner's code does with modules of these names; cached by class and layout.

    Args:
        owner: The module whose code is read.
        interest: The names of the layers beneath it that are asked about.
        live: Its methods that the model's own code may reach.
    """
    view, key = View(owner), (interest, live, words_of(type(owner)).stamp)
    with LOCK:
        known = FACTS.setdefault(type(owner), [])
        for of, tokens, found in known:
            if of == key and view.fits(tokens):
                return found
        found = _facts(view, interest, live)
        del known[:-_LAYOUTS]
        known.append((key, view.seen, found))
    return found


def _facts(view: View, interest: frozenset[str], live: frozenset[str]) -> Facts:
    owner = view.owner
    doubts = list(_doubts_of_owner(view))
    view.look("", "forward")
    if is_stock_sequential(owner):
        return _facts_of_sequential(view)
    reading = _Reading(view, interest, live)
    reading.read()
    return Facts(
        tuple(reading.calls), tuple(doubts + reading.doubts), tuple(dict.fromkeys(reading.supers))
    )


class _Reading:
    """Reads the methods of one owner that matter to the layers asked about."""

    def __init__(self, view: View, interest: frozenset[str], live: frozenset[str]) -> None:
        self.view, self.interest, self.live = view, interest, live
        self.members = {m.key: m for m in members_of(type(view.owner))}
        self.words = words_of(type(view.owner)).by_key
        self.calls: list[Call] = []
        self.doubts: list[Doubt] = []
        self.supers: list[tuple[str, str]] = []
        self.is_indexed = is_indexed(view.owner)
        hidden = (m for m in self.members.values() if not m.visible and m.name not in NOT_RUN)
        self.hidden = [m for m in hidden if self._matters(m)]
        self.seen: set[str] = set()

    def _matters(self, member: Member) -> bool:
        looks_round = member.name in self.live and (
            self.is_indexed or bool(member.said & INTROSPECTION)
        )
        return bool(self.words[member.key] & self.interest) or looks_round

    def read(self) -> None:
        for member in self.members.values():
            runs = member.name not in NOT_RUN or member.name in self.live
            by_super = bool(self.hidden) and "super" in member.said
            if member.visible and runs and (self._matters(member) or by_super):
                self.view.look("", member.name)
                self._read(member)

    def _read(self, member: Member) -> None:
        if member.key in self.seen:
            return
        self.seen.add(member.key)
        is_live = member.name in self.live
        try:
            tracer = self._tracer(member)
            nodes = list(tracer.write().nodes)
        except Refused as error:
            self._give_up(member, is_live, str(error))
            return
        self.doubts += [d for d in tracer.doubts if is_live or d.kind == "called"]
        found = (n for n in nodes if n.op == "call_module")
        self.calls += [described(n, self.view, member.key) for n in found]
        for _, key in (n.meta["super"] for n in nodes if "super" in n.meta):
            self.supers.append((member.key, key))
            above = self.members.get(key)
            if above is not None and (self._matters(above) or "super" in above.said):
                self._read(above)

    def _tracer(self, member: Member) -> Tracer:
        if not member.plain or len(member.functions) != 1:
            raise Refused("is decorated")
        if member.visible and member.name in vars(self.view.owner):
            raise Refused("was replaced on the instance")
        return Tracer(self.view, member.functions[0])

    def _give_up(self, member: Member, is_live: bool, why: str) -> None:
        self.doubts += _doubts_of_function(self.view, member, is_live, why)
        if "super" in member.said:
            for hidden in self.hidden:
                if hidden.key not in self.seen:
                    self.seen.add(hidden.key)
                    self._give_up(hidden, is_live, f"may be reached from where it {why}")


def _doubts_of_owner(view: View) -> Iterator[Doubt]:
    owner = view.owner
    cls = type(owner)
    view.look("", "parametrizations")
    if isinstance(owner, torch.jit.ScriptModule):
        yield Doubt("given", "", EVERYTHING, "the owner is a ScriptModule")
    elif isinstance(owner, fx.GraphModule):
        yield Doubt("given", "", EVERYTHING, "the owner is a GraphModule")
    elif "parametrizations" in owner._modules and cls.__name__.startswith("Parametrized"):
        yield Doubt("given", "", EVERYTHING, "the owner is itself parametrized")
    elif any(k.__name__ == "FSDPModule" for k in cls.__mro__):
        yield Doubt("given", "", EVERYTHING, "the owner is itself sharded by fully_shard")
    elif inspect.getattr_static(cls, "__getattribute__") is not object.__getattribute__:
        yield Doubt("given", "", EVERYTHING, "the owner has a __getattribute__ of its own")
    if "forward" in vars(owner):
        names = names_of(vars(owner)["forward"])
        yield Doubt("given", "", names, "forward was replaced on the instance")


def _facts_of_sequential(view: View) -> Facts:
    graph = fx.Graph()
    value = graph.placeholder("input")
    reason = "the owner is a stock nn.Sequential"
    doubts = []
    for path in view.items(""):
        value = graph.call_module(path, (value,))
        doubts.append(Doubt("called", path, NOTHING, reason))
    graph.output(value)
    return Facts(tuple(calls_of(graph, view.owner)), tuple(doubts))


def _doubts_of_function(view: View, member: Member, is_live: bool, why: str) -> list[Doubt]:
    reason = f"{member.name} {why}"
    doubts: list[Doubt] = []
    for function in member.functions:
        if is_trusted(function) and not is_trusted(type(view.owner)):
            continue
        try:
            tree = definition_of(function)
            refuse_private(tree)  # what a mangled name stands for is not followed
        except Refused as error:
            said = Names(spoken_by(function.__code__), False)
            text = reason if why.startswith(str(error)) else f"{reason}, and {error}"
            doubts.append(Doubt("given", "", said, text))
            continue
        if spoken_by(function.__code__) & FORBIDDEN - {"super"} and is_live:
            doubts.append(Doubt("given", "", EVERYTHING, reason))
        me = tree.args.args[0].arg if tree.args.args else ""
        reach = Reaching(view, me, {}, Scope(function, locals_of(tree, function)))
        reach.read(tree.body)
        doubts += [Doubt("called", p, NOTHING, reason) for p in reach.called]
        doubts += [Doubt("given", p, n, reason) for p, n in reach.given if is_live]
    return doubts
