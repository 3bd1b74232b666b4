"""One look at a model: its modules, its sites, what its author marks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from regwrap import sites
from regwrap.errors import PolicyError
from regwrap.sites import Node

Key = tuple[object, ...]
Family = tuple[str, ...]
Owner = tuple[nn.Module, str]

CALL = "call"


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
        self.model = model
        self.tree = sites.nodes(model)
        self.sites: dict[Key, Site] = {}
        self.keys: dict[int, dict[str, Key]] = {}
        self.names: dict[int, list[str]] = {}
        for node in self.tree:
            self.names.setdefault(id(node.module), []).append(node.path)
            if sites.is_fsdp1(node.module):
                raise PolicyError(_FSDP1.format(where=_at(node.path)))
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
            site.paths.append(join(node.path, name))

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


_FSDP1 = (
    "FullyShardedDataParallel{where} flattens parameters, so that a penalty would see one shard "
    "only; wrap the model with torch.distributed.fsdp.fully_shard instead."
)


def _key(module: nn.Module, name: str) -> Key:
    own = sites.own(module, name)
    return ("parameter", id(own)) if own is not None else ("effective", id(module), name)


def join(path: str, name: str) -> str:
    """The dotted path of a name beneath a path."""
    return f"{path}.{name}" if path else name


def _at(path: str) -> str:
    return f" at {path!r}" if path else ""


def _dims(module: nn.Module, name: str) -> int:
    own = sites.own(module, name)
    if own is not None:
        return 2 if sites.is_lazy(own) else own.dim()  # a lazy weight is known by its name alone
    shape = sites.shape(module, name)
    return 0 if shape is None else len(shape)


def can_be_penalised(module: nn.Module, name: str) -> bool:
    """Integer, bool and quantized tensors have no gradient to follow."""
    return all(t.is_floating_point() or t.is_complex() for t in sites.stored(module, name))


def elements(site: Site) -> int:
    """Elements of the parameters behind a site, 0 while they are lazy."""
    return sum(0 if sites.is_lazy(t) else t.numel() for t in sites.stored(*site.owners[0]))


def class_name(module: nn.Module) -> str:
    """The class of a module as its author named it."""
    return type(module).__name__
