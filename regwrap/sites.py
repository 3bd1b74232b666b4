"""What a model has to act on: its modules under all their names, and the parameters of each."""

from __future__ import annotations

import fnmatch
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from regwrap import graph
from regwrap.errors import PolicyError, brief
from regwrap.graph import joined

T = TypeVar("T")

_NORM_NAME = re.compile(r"norm(alization)?(act|gated)?(\dd)?$", re.IGNORECASE)
_NORM_TYPES = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.CrossMapLRN2d,
)


def is_lazy(tensor: Tensor) -> bool:
    """As torch's own function, which torch.compile cannot trace."""
    return isinstance(tensor, UninitializedTensorMixin)


@dataclass(frozen=True, eq=False)
class Node:
    """A module under one of its names; `parent` is the index of the node above it."""

    path: str
    module: nn.Module
    parent: int | None
    first: bool
    """Whether this is the module's first name, the one `named_modules` shows."""


def nodes(model: nn.Module) -> list[Node]:
    """Every name of every module, in `named_modules` order, without what is in parametrizations.

    A module that holds one of its own ancestors is not followed round.
    """
    found: list[Node] = []
    seen: set[int] = set()
    above: set[int] = set()

    def visit(path: str, module: nn.Module, parent: int | None) -> None:
        index = len(found)
        found.append(Node(path, module, parent, id(module) not in seen))
        seen.add(id(module))
        above.add(id(module))
        for name, child in module._modules.items():
            if child is None or id(child) in above or _is_hidden(module, name, child):
                continue
            visit(joined(path, name), child, index)
        above.remove(id(module))

    visit("", model, None)
    return found


def _is_hidden(module: nn.Module, name: str, child: nn.Module) -> bool:
    """Parametrizations, and the dropouts that a rewrite of ours put in."""
    return _is_machinery(name, child) or name in inserted(module)


def inserted(module: nn.Module) -> tuple[str, ...]:
    """The children that a rewrite of ours gave the module, by name."""
    made = getattr(type(module), graph.MADE, None)
    return () if made is None else made.names


def rewritten(module: nn.Module) -> dict[str, float]:
    """The children behind or before whose calls a rewrite of ours put dropouts, with the rates."""
    made = getattr(type(module), graph.MADE, None)
    return {} if made is None else {insert.child: insert.p for insert in made.inserts}


def submodule(owner: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None if it has been taken out since."""
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None


def children(module: nn.Module) -> list[nn.Module]:
    """The module's own children, as its author knows them."""
    named = module._modules.items()
    return [c for n, c in named if c is not None and not _is_hidden(module, n, c)]


def _is_machinery(name: str, child: nn.Module) -> bool:
    return name == "parametrizations" and isinstance(child, nn.ModuleDict)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DDP and DataParallel wrappers.

    Raises:
        TypeError: for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"regwrap needs an nn.Module, not {brief(model)} of type {type(model).__name__}."
        )
    while True:
        inner = _child(model, "_orig_mod" if _is_compiled(model) else "module")
        if inner is None or not (_is_compiled(model) or isinstance(model, _PARALLEL)):
            return model
        model = inner


_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def _is_compiled(module: nn.Module) -> bool:
    # Without importing torch._dynamo, which takes a second: no wrapper exists before it is loaded.
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames is not None and isinstance(module, frames.OptimizedModule)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is a `torch.compile` wrapper."""
    return _is_compiled(module)


def is_fsdp1(module: nn.Module) -> bool:
    """Whether the module is a wrapper of the first FSDP, which flattens parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def own(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that the module itself holds under this name."""
    return _get(module._parameters, name)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return _get(module._modules, name)


def _get(held: Mapping[str, T | None], name: str) -> T | None:
    return held[name] if name in held else None  # noqa: SIM401 a ScriptModule's knows no get()


def refuse_fsdp1(root: nn.Module) -> None:
    """Raises a PolicyError where the first FSDP is at or beneath the root."""
    if "torch.distributed.fsdp.fully_sharded_data_parallel" not in sys.modules:
        return
    for path, module in root.named_modules():
        # its wrapper, or asked through the wrapper the module inside, which holds the flat one
        if is_fsdp1(module) or hasattr(module, "_flat_param"):
            at = f" at {path!r}" if path else ""
            raise PolicyError(
                f"FullyShardedDataParallel{at} flattens parameters, so that a penalty would see "
                "one shard only; wrap the model with torch.distributed.fsdp.fully_shard instead."
            )


def sharded(root: nn.Module) -> set[int]:
    """The ids of all modules at and beneath a `fully_shard`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    cls = getattr(fsdp, "FSDPModule", ())
    return {id(m) for top in root.modules() if isinstance(top, cls) for m in top.modules()}


def parameter_names(module: nn.Module) -> Iterator[str]:
    """The module's own parameters as its author named them.

    A parametrized weight stands under its plain name (`weight`, not `weight_g` and `weight_v` or
    `parametrizations.weight.original`): there the effective weight is the site.
    """
    legacy = dict(_legacy(module))
    hidden = {f"{name}{end}" for name in legacy for end in ("_g", "_v", "_orig")}
    own = (n for n, p in module._parameters.items() if p is not None and n not in hidden)
    names = [*own, *legacy, *parametrized(module)]
    order = module.__dict__.get(ORDER, ())
    yield from sorted(names, key=lambda n: order.index(n) if n in order else len(order))


ORDER = "_regwrap_order"
"""Where a module parametrized by us keeps the order of its parameters."""


def parametrized(module: nn.Module) -> Iterable[str]:
    """The names of the module's parametrized tensors."""
    inside = _child(module, "parametrizations")
    return (
        inside._modules if inside is not None and _is_machinery("parametrizations", inside) else ()
    )


def parametrization(module: nn.Module, name: str) -> nn.Module:
    """The `ParametrizationList` of a parametrized tensor."""
    return module.get_submodule(f"parametrizations.{name}")


def _legacy(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Weights recomputed by the old pre-hooks of weight_norm, spectral_norm and prune."""
    hook: Any
    for hook in module._forward_pre_hooks.values():
        kind = type(hook)
        if kind.__module__ in (
            "torch.nn.utils.weight_norm",
            "torch.nn.utils.spectral_norm",
        ):
            yield hook.name, hook
        elif kind.__module__ == "torch.nn.utils.prune":
            yield hook._tensor_name, hook


def chain(module: nn.Module, name: str) -> list[nn.Module]:
    """The parametrizations of a tensor, the first that is applied first; none of a plain one."""
    if name not in parametrized(module):
        return []
    return list(parametrization(module, name)._modules.values())  # type: ignore[arg-type]


def is_mask(term: nn.Module) -> bool:
    """Whether a parametrization is a DropConnect of ours, beneath which lies the weight itself."""
    return hasattr(term, "regwrap_mask")


def is_product(term: nn.Module) -> bool:
    """Whether a parametrization is our U * V."""
    return hasattr(term, "regwrap_product")


def is_ours(term: nn.Module) -> bool:
    """Whether a parametrization was put there by a term."""
    return is_mask(term) or is_product(term)


def changed(module: nn.Module) -> set[tuple[str, bool]]:
    """The tensors that terms have parametrized, each with whether it is by a mask."""
    names = parametrized(module)
    return {(name, is_mask(p)) for name in names for p in chain(module, name) if is_ours(p)}


def plain(module: nn.Module, name: str) -> Tensor | None:
    """The parameter itself, also beneath a mask of ours; None for an effective weight."""
    found = own(module, name)
    if found is None and name in parametrized(module) and all(map(is_mask, chain(module, name))):
        return own(parametrization(module, name), "original")
    return found


def is_factored(module: nn.Module, name: str) -> bool:
    """Whether a term has made the weight, or what another computes it from, a product U * V."""
    return any(map(is_product, chain(module, name)))


def computed_from_several(module: nn.Module, name: str) -> bool:
    """Whether another computes the weight from several tensors, as weight_norm does."""
    if name not in parametrized(module) or is_factored(module, name):
        return False
    return len(parametrization(module, name)._parameters) > 1


def comes_late(module: nn.Module, name: str) -> bool:
    """Whether `parameters()` shows a tensor later once it is parametrized: in a child, the last."""
    names = list(parameter_names(module))
    children = (m for n, m in module._modules.items() if m is not None and not _is_machinery(n, m))
    return names[-1] != name or any(True for m in children for _ in m.parameters())


def factors(module: nn.Module, name: str) -> list[Tensor]:
    """U and V of a factored weight."""
    return [p for p in parametrization(module, name)._parameters.values() if p is not None]


def is_foreign(module: nn.Module, name: str) -> bool:
    """Whether the site is computed from other parameters by somebody else's machinery."""
    if name not in parametrized(module):
        return is_effective(module, name)
    return not all(map(is_ours, chain(module, name)))


def stored(module: nn.Module, name: str) -> list[Tensor]:
    """The parameters behind a site: itself, or what its parametrization computes it from."""
    if (parameter := plain(module, name)) is not None:
        return [parameter]
    if name in parametrized(module):
        return list(parametrization(module, name).parameters())
    ends = (f"{name}{end}" for end in ("_g", "_v", "_orig"))
    return [p for end in ends if (p := own(module, end)) is not None]


def is_effective(module: nn.Module, name: str) -> bool:
    """Whether the site is computed from other parameters."""
    return plain(module, name) is None and bool(stored(module, name))


def read(module: nn.Module, name: str) -> Tensor | None:
    """The live tensor of a site; None where there is none (yet).

    A parametrized weight is computed anew with its parametrizations in eval: no power iteration
    runs and no cache is filled.
    """
    found: object = plain(module, name)
    if found is None:
        effective = is_effective(module, name)
        found = _effective(module, name) if effective else module.__dict__.get(name)
    return found if isinstance(found, Tensor) and not is_lazy(found) else None


def _effective(module: nn.Module, name: str) -> Tensor:
    if name in parametrized(module):
        return _in_eval(parametrization(module, name))
    hook = dict(_legacy(module))[name]
    if hasattr(hook, "apply_mask"):
        return hook.apply_mask(module)  # type: ignore[no-any-return]
    if type(hook).__module__ == "torch.nn.utils.spectral_norm":
        return hook.compute_weight(module, do_power_iteration=False)  # type: ignore[no-any-return]
    return hook.compute_weight(module)  # type: ignore[no-any-return]


def _in_eval(inside: nn.Module) -> Tensor:
    training = [m for m in inside.modules() if m.training]
    try:
        for m in training:
            m.training = False
        return inside()  # type: ignore[no-any-return]
    finally:
        for m in training:
            m.training = True


def look(module: nn.Module, name: str) -> Tensor | None:
    """The value of a site, as `read`, without a graph and without moving the random state."""
    if not is_effective(module, name):
        return read(module, name)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return read(module, name)


def shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape of a site, None while it is lazy; without moving the random state."""
    tensor = look(module, name)
    return None if tensor is None else tuple(tensor.shape)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a normalization layer, by its class or by its class's name."""
    return isinstance(module, _NORM_TYPES) or bool(_NORM_NAME.search(type(module).__name__))


def is_bias(name: str) -> bool:
    """Whether a parameter's own name is one of a bias: `bias`, `bias_ih_l0`, `in_proj_bias`."""
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def is_plain(module: nn.Module, name: str, dims: int) -> bool:
    """Whether a parameter is a weight proper: 2 dimensions, no bias, not of a norm layer."""
    return dims >= 2 and not is_bias(name) and not is_norm(module)


def author_marks(tree: list[Node]) -> set[tuple[int, str]]:
    """What the model's author keeps from decay, as (id of the module, parameter's name).

    Known spellings: `no_weight_decay` (a method, property or attribute: names or patterns relative
    to the module), `no_weight_decay_keywords` (parts of names), and the parameter's own
    `_no_weight_decay`, `no_weight_decay` or `_optim = {"weight_decay": 0}`.
    """
    marks = set()
    for node, scopes in zip(tree, _scopes(tree), strict=True):
        for name in parameter_names(node.module):
            path = joined(node.path, name)
            if any(scope.marks(path) for scope in scopes) or any(
                _marks_itself(p) for p in stored(node.module, name)
            ):
                marks.add((id(node.module), name))
    return marks


@dataclass(frozen=True)
class _Scope:
    prefix: str
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    everything: bool

    def marks(self, path: str) -> bool:
        if not path.startswith(self.prefix):
            return False
        path = path[len(self.prefix) :]
        return (
            self.everything
            or any(word in path for word in self.keywords)
            or any(
                path == name or path.startswith(f"{name}.") or fnmatch.fnmatchcase(path, name)
                for name in self.names
            )
        )


_SPELLED = ("no_weight_decay", "no_weight_decay_keywords")


def _scopes(tree: list[Node]) -> list[tuple[_Scope, ...]]:
    """The scopes in which each node lies: its own, if it spells one, and those above it."""
    plain: set[type] = set()  # classes seen to spell nothing: getattr_static is slow
    found: list[tuple[_Scope, ...]] = []
    for node in tree:
        above = () if node.parent is None else found[node.parent]
        own = _own_scope(node, plain)
        found.append(above if own is None else (*above, own))
    return found


def _own_scope(node: Node, plain: set[type]) -> _Scope | None:
    cls, own = type(node.module), node.module.__dict__
    if cls in plain and not any(name in own for name in _SPELLED):
        return None
    names, keywords = (_spelled(node, name) for name in _SPELLED)
    if names is None and keywords is None:
        if not any(name in vars(base) for base in cls.__mro__ for name in _SPELLED):
            plain.add(cls)  # a property may say nothing here and something of another instance
        return None
    prefix = f"{node.path}." if node.path else ""
    return _Scope(prefix, _strings(names), _strings(keywords), everything=names is True)


def _spelled(node: Node, name: str) -> object:
    """The author's mark, or None; looked up statically so that no `__getattr__` invents one."""
    if inspect.getattr_static(node.module, name, None) is None:
        return None
    value = getattr(node.module, name)
    return value() if callable(value) else value


def _strings(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, Iterable) else ()


def _marks_itself(parameter: Tensor) -> bool:
    if getattr(parameter, "_no_weight_decay", False) or getattr(
        parameter, "no_weight_decay", False
    ):
        return True
    optim = getattr(parameter, "_optim", None)
    return isinstance(optim, dict) and optim.get("weight_decay") == 0
