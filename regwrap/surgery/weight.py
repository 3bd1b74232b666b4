"""Terms that change the weight, as `torch.nn.utils.parametrize` modules.

The layer keeps its plain `state_dict` keys, its class's name and its pickle; `named_parameters`
shows the parametrization's names, which is the one stated exception to "nothing is touched".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

from regwrap import identity, record, sites
from regwrap.penalty import RegularizedMixin
from regwrap.record import HOOK, REDO, Factor
from regwrap.surgery import scheduled
from regwrap.terms import L1, DropConnect

_ORDER = sites.ORDER
_LOOKS = ("__name__", "__qualname__", "__module__", "__doc__")
_HOOK: Any = HOOK  # Any: torch's annotations know integer keys only
_HALF = 0.5  # (w / c) * c is w bit for bit only for powers of two; FACTS say 0.3 to 1 trains well


class Mask(nn.Module):
    """DropConnect: one draw per read in training, the weight itself in eval."""

    regwrap_mask = True  # tells sites that the parameter beneath is the weight

    def __init__(self, p: float, factor: Factor | None = None) -> None:
        super().__init__()
        self.p = p
        self.factor = factor

    def forward(self, w: Tensor) -> Tensor:
        """W * mask / (1 - p)."""
        if not self.training:
            return w
        if w.is_complex():  # torch has no complex dropout
            return w * self._dropped(torch.ones_like(w.real))
        return self._dropped(w)

    def _dropped(self, w: Tensor) -> Tensor:
        if self.factor is None:
            return F.dropout(w, self.p, True)
        return scheduled.drop(w, self.p, self.factor)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Refused: what functional_call puts back after a call is what it read, a masked weight."""
        raise NotImplementedError(
            "A weight under DropConnect cannot be assigned by its own name; assign (and name in "
            "functional_call) parametrizations.<name>.original, or unregularize first."
        )


class Product(nn.Module):
    """W = U * V, by which L1 becomes smooth: min |U|^2/2 + |V|^2/2 over U * V = W is |W|_1.

    V starts at a constant: a balanced start could never change a weight's sign.

    Source: Hoff, Lasso, fractional norm and structured sparse estimation using a Hadamard product
    parametrization (2017).
    """

    regwrap_product = True

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """U * V."""
        return u * v

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """U = W / c, V = c."""
        return w / _HALF, torch.full_like(w, _HALF)


def sync(module: nn.Module) -> None:
    """Gives the module the parametrizations that its record asks for, touching no others."""
    held = record.read(module)
    marks = [m for m in held.marks if m.mechanism == "parametrization"]
    masks = {m.site: (m.term.p, held.factor(m)) for m in marks if isinstance(m.term, DropConnect)}
    products = [m.site for m in marks if isinstance(m.term, L1)]
    for name in list(sites.parametrized(module)):
        if name not in masks:
            _take_mask(module, name)
        if name not in products:
            _take_product(module, name)
    for name in products:
        _put_product(module, name)
    for name, rate in masks.items():
        _put_mask(module, name, *rate)
    _tidy(module)


def revert(module: nn.Module) -> None:
    """Takes back all of it: what was trained stays, as a plain parameter at its old place."""
    for name in list(sites.parametrized(module)):
        _take_mask(module, name)
        _take_product(module, name)
    _tidy(module)


def _put_mask(module: nn.Module, name: str, p: float, factor: Factor | None) -> None:
    for mask in filter(sites.is_mask, sites.chain(module, name)):
        vars(mask).update(p=p, factor=factor)
        return
    _put(module, name, Mask(p, factor))


def _put_product(module: nn.Module, name: str) -> None:
    """The product goes beneath the parametrizations that are there already: W is what they see."""
    if sites.is_factored(module, name):
        return
    if name not in sites.parametrized(module):
        _put(module, name, Mask(0))
        _renumber(sites.parametrization(module, name), [])
    inside = sites.parametrization(module, name)
    _renumber(inside, [Product().train(module.training), *sites.chain(module, name)])
    _factor(inside)
    _hook(inside, save_list, load_list)


def _factor(inside: Any) -> None:
    """Makes a list compute from U and V. U is the parameter itself, so that undo gives it back."""
    own = inside._parameters.pop("original")
    u, v = _split(own.detach())
    _set(own, u)
    other = nn.Parameter(v, requires_grad=own.requires_grad)
    vars(other).update(vars(own))  # an author's mark, such as _no_weight_decay
    inside._parameters.update(original0=own, original1=other)
    inside.is_tensor, inside.ntensors = False, 2


def _multiply(inside: Any) -> None:
    """The inverse of `_factor`."""
    own, other = (inside._parameters.pop(f"original{i}") for i in (0, 1))
    _set(own, (own * other).detach())
    inside._parameters["original"] = own
    inside.is_tensor, inside.ntensors = True, 1


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    """Gives a parameter other values, and leaves what else looks at its old ones alone."""
    if type(parameter.data) is Tensor:
        parameter.data = value
    else:  # of a DTensor, .data changes the wrapper and not the shard
        with torch.no_grad():
            parameter.copy_(value)


def _put(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    if _HOOK not in module._state_dict_hooks:
        module.__dict__[_ORDER] = tuple(module._parameters)
        module.__dict__[REDO] = sync
        _hook(module, save_plain, load_plain)
    there = name in sites.parametrized(module)
    checked = not (there and sites.parametrization(module, name).unsafe)
    fresh = not parametrize.is_parametrized(module)
    # unsafe: the checks would read the weight, and with it draw a mask
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    if fresh:
        _dress(module)
    inside: Any = sites.parametrization(module, name)
    inside.unsafe = not checked
    _hook(inside, save_list, load_list)


def _hook(module: nn.Module, save: Callable[..., None], load: Callable[..., None]) -> None:
    if _HOOK not in module._state_dict_hooks:
        module._state_dict_hooks[_HOOK] = save
        module._load_state_dict_pre_hooks[_HOOK] = _WrappedHook(load, module)


def _unhook(module: nn.Module) -> None:
    module._state_dict_hooks.pop(_HOOK, None)
    module._load_state_dict_pre_hooks.pop(_HOOK, None)


def _take_mask(module: nn.Module, name: str) -> None:
    chain = sites.chain(module, name)
    _take(module, name, [p for p in chain if not sites.is_mask(p)])


def _take_product(module: nn.Module, name: str) -> None:
    if sites.is_factored(module, name):
        _multiply(sites.parametrization(module, name))
        _take(module, name, sites.chain(module, name)[1:])


def _take(module: nn.Module, name: str, kept: list[nn.Module]) -> None:
    """Leaves these of a tensor's parametrizations."""
    if len(kept) == len(sites.chain(module, name)):
        return
    inside = sites.parametrization(module, name)
    _renumber(inside, kept)
    if not any(map(sites.is_ours, kept)):
        _unhook(inside)
    if not kept:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def _renumber(inside: nn.Module, chain: list[nn.Module]) -> None:
    """Makes this the chain of a list, which is read by number until one is missing."""
    inside._modules.clear()
    inside._modules.update({str(i): parametrization for i, parametrization in enumerate(chain)})


def _tidy(module: nn.Module) -> None:
    """Puts the parameters back in their order, and takes the hooks when nothing is left."""
    chains = (sites.chain(module, name) for name in sites.parametrized(module))
    if _ORDER not in module.__dict__ or any(map(sites.is_ours, itertools.chain(*chains))):
        return
    module.__dict__.pop(REDO)
    order = {name: i for i, name in enumerate(module.__dict__.pop(_ORDER))}
    ranked = sorted(module._parameters.items(), key=lambda item: order.get(item[0], len(order)))
    module._parameters.clear()
    module._parameters.update(ranked)
    _unhook(module)
    if identity.PARAMETRIZED in type(module).__dict__:  # another's came later and is left
        _undress(module)


# --- the layer's class: its own name, its own pickle ---------------------------------------------


def _dress(module: nn.Module) -> None:
    """Makes the class that parametrize made look and pickle like the layer's own."""
    cls, base = type(module), type(module).__bases__[0]
    for look in _LOOKS:
        setattr(cls, look, getattr(base, look))
    for method in ("__getstate__", "__deepcopy__"):  # one forbids pickling, one shares the class
        if method in cls.__dict__:
            delattr(cls, method)
    cls.__reduce_ex__ = _reduce  # type: ignore[assignment, method-assign]
    setattr(cls, identity.PARAMETRIZED, True)


def _undress(module: nn.Module) -> None:
    """Makes the class a parametrized one as parametrize makes it."""
    dressed = type(module)
    module.__class__ = dressed.__bases__[0]
    parametrize._inject_new_class(module)
    for name in sites.parametrized(module):
        setattr(type(module), name, dressed.__dict__[name])


def _reduce(self: nn.Module, protocol: Any) -> Any:
    spliced = identity.is_spliced(self, RegularizedMixin)
    base = identity.plain_class(type(self), RegularizedMixin).__bases__[0]
    return (_rebuild, (base, tuple(sites.parametrized(self)), spliced), base.__getstate__(self))  # type: ignore[call-arg]


def _rebuild(base: type[nn.Module], names: tuple[str, ...], spliced: bool) -> nn.Module:
    """What unpickling calls: an empty layer whose class is parametrized again, its own alone."""
    module = base.__new__(base)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    _dress(module)
    if spliced:
        identity.splice(module, RegularizedMixin)
    return module


# --- plain state_dict keys ---------------------------------------------------------------------


def save_plain(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """A state_dict hook: weights under their plain names, in the plain order."""
    metadata = getattr(state, "_metadata", {})
    ours = list(_only_ours(module))
    for name in ours:
        inner = f"{prefix}parametrizations.{name}"
        state[f"{prefix}{name}"] = state.pop(f"{inner}.original")
        for path, _ in sites.parametrization(module, name).named_modules():
            metadata.pop(f"{inner}.{path}" if path else inner, None)
    if len(ours) == len(list(sites.parametrized(module))):
        metadata.pop(f"{prefix}parametrizations", None)
    _put_first(module, state, prefix, module.__dict__[_ORDER])


def save_list(
    inside: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """A state_dict hook of a list: without its parametrizations of ours, as if they were not."""
    if _computes_product(inside):
        u, v = (state.pop(f"{prefix}{name}") for name in inside._parameters)
        state[f"{prefix}original"] = u * v
        _put_first(inside, state, prefix, ["original"])
    numbers = _numbers(inside)
    for held in (state, getattr(state, "_metadata", {})):
        for old in _last(held, prefix):
            number, dot, rest = old.removeprefix(prefix).partition(".")
            value = held.pop(old)
            if number not in inside._modules:
                held[old] = value
            elif number in numbers:
                held[f"{prefix}{numbers[number]}{dot}{rest}"] = value


def _computes_product(inside: nn.Module) -> bool:
    return any(sites.is_product(p) for p in inside.children())


def _numbers(inside: nn.Module) -> dict[str, str]:
    """The number of each parametrization of others, and the one it would have without ours."""
    others = (k for k, p in inside._modules.items() if p is not None and not sites.is_ours(p))
    return {number: str(i) for i, number in enumerate(others)}


def _put_first(module: nn.Module, state: dict[str, Any], prefix: str, names: Iterable[str]) -> None:
    """Moves these before all else that the module has put into the state."""
    known = {*names, *module._parameters, *module._buffers, *module._modules, "_extra_state"}
    own = [key for key in _last(state, prefix) if _head(key, prefix) in known]
    mine = [f"{prefix}{name}" for name in names if f"{prefix}{name}" in state]
    for key in (*mine, *(k for k in own if k not in mine)):
        state[key] = state.pop(key)


def _last(held: dict[str, Any], prefix: str) -> list[str]:
    """The keys of a module whose turn it is: they are the last ones."""
    return list(itertools.takewhile(lambda key: key.startswith(prefix), reversed(held)))[::-1]


def _head(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).partition(".")[0]


def load_plain(module: nn.Module, state: dict[str, Any], prefix: str, *told: Any) -> None:
    """A load_state_dict pre-hook: plain names back into the parametrizations' own."""
    _, _, missing, *_ = told
    for name in _only_ours(module):
        inner = f"{prefix}parametrizations.{name}."
        if f"{prefix}{name}" in state:
            whole = state.pop(f"{prefix}{name}")
            # torch.distributed.checkpoint spreads what it finds under named_parameters' names
            own = sites.stored(module, name)[0]
            late = hasattr(own, "placements") and not hasattr(whole, "placements")
            state[f"{inner}original"] = record.spread(whole, own) if late else whole
        else:
            _leave(sites.parametrization(module, name), state, inner, missing, f"{prefix}{name}")


def load_list(inside: nn.Module, state: dict[str, Any], prefix: str, *told: Any) -> None:
    """A load_state_dict pre-hook, the inverse of `save_list`."""
    _, _, missing, *_ = told
    for number, plain in reversed(_numbers(inside).items()):
        for old in [k for k in state if k.startswith(f"{prefix}{plain}.")]:
            state[f"{prefix}{number}{old.removeprefix(prefix + plain)}"] = state.pop(old)
    whole = f"{prefix}original"
    if not _computes_product(inside):
        return
    if whole in state:
        parts = _split(state.pop(whole))
        state.update({f"{prefix}{n}": p for n, p in zip(inside._parameters, parts, strict=True)})
    else:
        _leave(inside, state, prefix, missing, whole)


def _leave(
    inside: nn.Module, state: dict[str, Any], prefix: str, missing: list[str], key: str
) -> None:
    """Leaves a list as it is, and reports its tensor as missing by its plain name."""
    own = {f"{prefix}{name}": parameter for name, parameter in inside._parameters.items()}
    if not any(name in state for name in own):
        missing.append(key)
        state.update(own)


def _split(weight: Tensor) -> tuple[Tensor, Tensor]:
    return Product().right_inverse(weight)


def _only_ours(module: nn.Module) -> Iterator[str]:
    """The names of the tensors that nobody else has parametrized."""
    return (name for name in sites.parametrized(module) if not sites.is_foreign(module, name))
