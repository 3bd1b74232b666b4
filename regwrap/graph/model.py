"""The whole model: who calls each layer, and whether all of that may be rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from regwrap.graph.classes import (
    NOT_RUN,
    functions_run,
    read_words,
    roots_of,
    words_of,
)
from regwrap.graph.names import INTROSPECTION, Names, code_kept, globals_said, is_from, names_of
from regwrap.graph.owner import LOCK, Facts, facts
from regwrap.graph.source import codes_within
from regwrap.graph.strays import Above, Strays, strays_of
from regwrap.graph.verdicts import Site, Verdict
from regwrap.graph.view import has_body, is_indexed, is_stock_sequential


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, a subclass of it, or transformers' `Conv1D`."""
    cls = type(module)
    conv1d = cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")
    return conv1d or isinstance(module, nn.Linear)


def survey(model: nn.Module, wanted: Callable[[nn.Module], bool] = is_linear) -> dict[str, Verdict]:
    """Who calls each layer that is wanted, and whether its owners may be rewritten.

    The keys are the layers' first names, in the order of `named_modules`.
    """
    above = _ways(model, wanted)
    interest = _interests(above)
    with LOCK:
        read_words({type(m) for m in model.modules()})
        live = _live_members(model)
        strays = strays_of(model)
        read = _Reader(interest, _kept_code(above), live)
        asked = _classes_asked(live)
        return {
            path: _judge(path, layer, ways, read, strays, asked)
            for path, (layer, ways) in above.items()
        }


def _ways(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> dict[str, tuple[nn.Module, list[Above]]]:
    """For each layer every module above it, under every name."""
    found: dict[int, tuple[str, nn.Module, dict[tuple[int, str], Above]]] = {}
    stack: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        if any(module is m for _, m in stack):
            return
        stack.append((name, module))
        if wanted(module) and len(stack) > 1:
            first = ".".join(n for n, _ in stack[1:])
            ways = found.setdefault(id(module), (first, module, {}))[2]
            for way in _way(stack):
                ways.setdefault((id(way.module), way.child), way)
        for child_name, child in module._modules.items():
            if child is not None:
                visit(child_name, child)
        stack.pop()

    visit("", model)
    return {first: (layer, list(ways.values())) for first, layer, ways in found.values()}


def _way(stack: list[tuple[str, nn.Module]]) -> Iterator[Above]:
    end = len(stack) - 1
    named = end
    while named > 0 and is_indexed(stack[named - 1][1]):
        named -= 1
    owner = next((i for i in range(end - 1, -1, -1) if has_body(stack[i][1])), 0)
    for i in range(end):
        yield Above(
            ".".join(n for n, _ in stack[1 : i + 1]),
            stack[i][1],
            ".".join(n for n, _ in stack[i + 1 :]),
            stack[named][0],
            ".".join(n for n, _ in stack[i + 1 : named + 1]),
            i == owner,
        )


def _interests(above: dict[str, tuple[nn.Module, list[Above]]]) -> dict[int, frozenset[str]]:
    found: dict[int, set[str]] = {}
    for _, ways in above.values():
        for way in ways:
            found.setdefault(id(way.module), set()).add(way.local)
    return {i: frozenset(names) for i, names in found.items()}


def _kept_code(above: dict[str, tuple[nn.Module, list[Above]]]) -> dict[int, frozenset[str]]:
    """For each module above a layer its attributes with code that may call what lies elsewhere."""
    modules: dict[int, nn.Module] = {}
    beneath: dict[int, dict[str, set[str]]] = {}
    for _, ways in above.values():
        for way in ways:
            modules[id(way.module)] = way.module
            by_child = beneath.setdefault(id(way.module), {})
            by_child.setdefault(way.child.partition(".")[0], set()).add(way.local)
    known: dict[int, Names] = {}
    return {i: frozenset(_attributes_calling(m, beneath[i], known)) for i, m in modules.items()}


def _attributes_calling(
    module: nn.Module, beneath: dict[str, set[str]], known: dict[int, Names]
) -> Iterator[str]:
    for attribute, value in (*vars(module).items(), *module._modules.items()):
        kept = [] if attribute in _TABLES else code_kept(value)
        elsewhere = [names for child, names in beneath.items() if child != attribute]
        if kept and elsewhere:
            for code in kept:
                if id(code) not in known:
                    known[id(code)] = names_of(code)
            others = frozenset[str]().union(*elsewhere)
            if any(known[id(c)].wide or known[id(c)].names & others for c in kept):
                yield attribute


_TABLES = frozenset(vars(nn.Module()))


def _live_members(model: nn.Module) -> dict[type, frozenset[str]]:
    """For each class the members that code of the model may reach, by name."""
    classes = {type(m) for m in model.modules()}
    live = {c: words_of(c).live(roots_of(words_of(c).members)) for c in classes}
    while True:
        spoken = frozenset().union(*(words_of(c).said(live[c]) for c in classes))
        wider = {
            c: words_of(c).live({*live[c], *(spoken & words_of(c).members.keys())}) for c in classes
        }
        if wider == live:
            return live
        live = wider


def _judge(
    path: str,
    layer: nn.Module,
    ways: list[Above],
    read: _Reader,
    strays: Strays,
    asked: frozenset[type],
) -> Verdict:
    sites: list[Site] = []
    reasons: list[str] = []
    for way in ways:
        found = read.facts(way)
        if found is None:
            continue
        calls = tuple(c for c in found.calls if c.child == way.child)
        if calls:
            sites.append(Site(way.path, way.child, calls))
            reasons.append(_class_doubt(type(way.module), asked))
        reasons.append(found.doubt(way.child, way.local, way.anchor))
    reasons += [_hooks_doubt(way) for way in ways]
    if isinstance(layer, torch.jit.ScriptModule):
        reasons.append("the layer is a ScriptModule")
    reasons.append(strays.doubt(layer, ways, read.live))
    return Verdict(path, tuple(sites), next(filter(None, reasons), ""))


def _classes_asked(live: dict[type, frozenset[str]]) -> frozenset[type]:
    """The module classes that code which takes the class of something names."""
    found: set[type] = set()
    for cls, members in live.items():
        for function in functions_run(cls, members):
            names = {n for code in codes_within(function.__code__) for n in code.co_names}
            if names & {"type", "__class__"}:
                named = globals_said(function, frozenset(names))
                found.update(v for v in named if isinstance(v, type) and issubclass(v, nn.Module))
    return frozenset(found)


def _class_doubt(cls: type, asked: frozenset[type]) -> str:
    # by name: a class of ours, on top of an author's, has the name of that one
    own = (cls.__module__, cls.__qualname__)
    is_asked = any((c.__module__, c.__qualname__) == own for c in asked)
    return f"code might ask for the exact class {cls.__name__}" if is_asked else ""


def _hooks_doubt(way: Above) -> str:
    """A hook of the user's on a module above may call the layer itself."""
    module = way.module
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not is_from(hook, ("regwrap",)) and names_of(hook).may_call(way.local):
            return f"a forward hook of the {type(module).__name__} above it might call it"
    return ""


@dataclass(slots=True)
class _Reader:
    """Reads every module above a layer once."""

    interest: dict[int, frozenset[str]]
    kept: dict[int, frozenset[str]]
    live: dict[type, frozenset[str]]
    said: dict[type, tuple[frozenset[str], bool]] = field(default_factory=dict)
    known: dict[int, Facts] = field(default_factory=dict)
    bodies: dict[int, tuple[bool, bool]] = field(default_factory=dict)

    def facts(self, way: Above) -> Facts | None:
        """Of an owner whose code can say the layer's name or looks around; None of another."""
        if not self._is_relevant(way):
            return None
        found = self.known.get(id(way.module))
        if found is None:
            found = self.known[id(way.module)] = self._read(way.module)
        return found

    def _is_relevant(self, way: Above) -> bool:
        module = way.module
        body = self.bodies.get(id(module))
        if body is None:
            body = (has_body(module), is_stock_sequential(module))
            self.bodies[id(module)] = body
        if not all(body):
            return body[0] and self._is_said(way)
        return way.is_owner

    def _is_said(self, way: Above) -> bool:
        module = way.module
        said, is_wide = self._said(type(module))
        special = isinstance(module, torch.jit.ScriptModule | fx.GraphModule)
        named = way.local in said or not way.anchor or bool(self.kept[id(module)] & said)
        return named or is_wide or special or "forward" in vars(module)

    def _said(self, cls: type) -> tuple[frozenset[str], bool]:
        found = self.said.get(cls)
        if found is None:
            words = words_of(cls)
            live = self.live[cls]
            is_wide = bool(words.said(live) & INTROSPECTION)
            runs = (m for m in words.members if m not in NOT_RUN or m in live)
            found = self.said[cls] = (words.said(runs), is_wide)
        return found

    def _read(self, module: nn.Module) -> Facts:
        if is_stock_sequential(module):
            return facts(module, frozenset(), frozenset())
        names = self.interest[id(module)] | self.kept[id(module)]
        interest = names & self._said(type(module))[0]
        return facts(module, interest, self.live[type(module)])
