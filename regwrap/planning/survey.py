"""One look at a model: its modules, its sites, what its author marks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from regwrap import graph, sites
from regwrap.graph import joined
from regwrap.sites import Node

Key = tuple[object, ...]
Family = tuple[str, ...]
Owner = tuple[nn.Module, str]

CALL = "call"
OUTPUT = "output"


@dataclass(frozen=True, eq=False)
class Site:
    """What a term can act on, with all the names under which the model holds it."""

    key: Key
    owners: list[Owner] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def live(self) -> Tensor | None:
        """The plain parameter, None for an effective weight."""
        module, name = self.owners[0]
        return sites.own(module, name)


class Survey:
    """One look at a model: its modules, its sites, what its author marks."""

    def __init__(self, model: nn.Module) -> None:
        sites.refuse_fsdp1(model)
        self.model = model
        self.tree = sites.nodes(model)
        self.sites: dict[Key, Site] = {}
        self.keys: dict[int, dict[str, Key]] = {}
        self.names: dict[int, list[str]] = {}
        for node in self.tree:
            self.names.setdefault(id(node.module), []).append(node.path)
            self._add(node)
        # a tied weight is spared whichever of its names the author gave
        self.marked = {self.keys[i][name] for i, name in sites.author_marks(self.tree)}
        self.idle = {id(owner.out_proj) for owner in self._attentions()}
        """Linears that are never called: a function uses their weights."""

    def _attentions(self) -> Iterator[nn.MultiheadAttention]:
        return (n.module for n in self.tree if isinstance(n.module, nn.MultiheadAttention))

    def _add(self, node: Node) -> None:
        keys = self.keys.setdefault(id(node.module), {})
        for name in sites.parameter_names(node.module):
            key = keys[name] = _key(node.module, name)
            site = self.sites.setdefault(key, Site(key))
            site.owners.append((node.module, name))
            site.paths.append(joined(node.path, name))

    @functools.cached_property
    def _of_linears(self) -> dict[str, graph.Verdict]:
        # apart: the more names are asked about, the more code may be talking of them
        return graph.survey(self.model)

    @functools.cached_property
    def _of_all(self) -> dict[str, graph.Verdict]:
        return graph.survey(self.model, lambda module: True)

    def verdict(self, module: nn.Module) -> graph.Verdict | None:
        """Who calls the module, as far as the code can be read; None for the model itself."""
        verdicts = self._of_linears if graph.is_linear(module) else self._of_all
        return verdicts.get(self.names[id(module)][0])

    def is_output(self, module: nn.Module) -> bool:
        """Whether what the module returns is what the model returns, for all that can be read."""
        verdict = self.verdict(module)
        for site in () if verdict is None else verdict.sites:
            returned = any(call.returned for call in site.calls)
            owner = self.model.get_submodule(site.owner)
            if returned and owner is not module and self._returns(owner):
                return True
        return False

    def _returns(self, owner: nn.Module) -> bool:
        return owner is self.model or self.is_output(owner)

    def is_called(self, module: nn.Module) -> bool:
        """Whether the module's call can be seen: it has a forward, and somebody calls it."""
        own = type(module).forward is not nn.Module.forward or "forward" in module.__dict__
        return own and id(module) not in self.idle

    def firsts(self) -> Iterator[Node]:
        """Every module once, under its first name."""
        return (node for node in self.tree if node.first)

    def covers(self, on: str | tuple[str, ...], module: nn.Module, name: str) -> bool:
        """Whether `on` takes the module's parameter of this name."""
        if not can_be_penalised(module, name):
            return False
        if on == "all":
            return True
        if on == "bias":
            return sites.is_bias(name)
        if on != "weight":
            return name in ((on,) if isinstance(on, str) else on)
        marked = self.keys[id(module)][name] in self.marked
        return not marked and sites.is_plain(module, name, _dims(module, name))


def _key(module: nn.Module, name: str) -> Key:
    own = sites.plain(module, name)
    return ("parameter", id(own)) if own is not None else ("effective", id(module), name)


def _dims(module: nn.Module, name: str) -> int:
    own = sites.plain(module, name)
    if own is not None:
        return 2 if sites.is_lazy(own) else own.dim()  # a lazy weight is known by its name alone
    shape = sites.shape(module, name)
    return 0 if shape is None else len(shape)


def can_be_penalised(module: nn.Module, name: str) -> bool:
    """Integer, bool and quantized tensors have no gradient to follow."""
    return all(t.is_floating_point() or t.is_complex() for t in sites.stored(module, name))


def elements(site: Site) -> int:
    """Elements of the parameters behind a site, 0 while they are lazy."""
    return sum(t.numel() for t in _behind(site))


def shapes(site: Site) -> tuple[tuple[int, ...], ...]:
    """Shapes of the parameters behind a site, none while they are lazy."""
    return tuple(tuple(t.shape) for t in _behind(site))


def _behind(site: Site) -> list[Tensor]:
    stored = sites.stored(*site.owners[0])
    if sites.is_factored(*site.owners[0]):
        stored = stored[:1]  # W = U * V is shaped as U is
    return [t for t in stored if not sites.is_lazy(t)]


def class_name(module: nn.Module) -> str:
    """The class of a module as its author named it."""
    return type(module).__name__
