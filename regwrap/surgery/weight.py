"""Terms that change the weight, as `torch.nn.utils.parametrize` modules.

The layer keeps its plain `state_dict` keys, its class's name and its pickle; `named_parameters`
shows the parametrization's names, which is the one stated exception to "nothing is touched".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from regwrap import identity, record, sites
from regwrap.penalty import RegularizedMixin
from regwrap.record import HOOK
from regwrap.terms import L1, DropConnect

_ORDER = sites.ORDER
_LOOKS = ("__name__", "__qualname__", "__module__", "__doc__")
_HALF = 0.5  # (w / c) * c is w bit for bit only for powers of two; FACTS say 0.3 to 1 trains well


class Mask(nn.Module):
    """DropConnect: one draw per read in training, the weight itself in eval."""

    regwrap_mask = True  # tells sites that the parameter beneath is the weight

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, w: Tensor) -> Tensor:
        """W * mask / (1 - p)."""
        return F.dropout(w, self.p, self.training)


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
    """Gives the module the parametrizations that its record asks for."""
    marks = [m for m in record.read(module).marks if m.mechanism == "parametrization"]
    masks = {m.site: m.term.p for m in marks if isinstance(m.term, DropConnect)}
    products = {m.site for m in marks if isinstance(m.term, L1)}
    for name in list(sites.parametrized(module)):
        _take_mask(module, name)
        if name not in products:
            _take_product(module, name)
    for name in products:
        _put_product(module, name)
    for name, p in masks.items():
        _put(module, name, Mask(p))
    _tidy(module)


def revert(module: nn.Module) -> None:
    """Takes back all of it: what was trained stays, as a plain parameter at its old place."""
    for name in list(sites.parametrized(module)):
        _take_mask(module, name)
        _take_product(module, name)
    _tidy(module)


def _put(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    fresh = not parametrize.is_parametrized(module)
    if fresh:
        module.__dict__[_ORDER] = tuple(module._parameters)
    # unsafe: the checks would read the weight, and with it draw a mask
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    if fresh:
        _dress(module)
        hook: Any = HOOK
        module._state_dict_hooks[hook] = save_plain
        module._load_state_dict_pre_hooks[hook] = nn.modules.module._WrappedHook(load_plain, module)


def _put_product(module: nn.Module, name: str) -> None:
    """The product goes beneath a parametrization that is there already."""
    if any(_is_product(p) for p in _chain(module, name)) or _beneath(module, name) is not None:
        return
    if name in sites.parametrized(module):
        inside = module.get_submodule(f"parametrizations.{name}")
        _put(inside, "original", Product())
    else:
        _put(module, name, Product())


def _beneath(module: nn.Module, name: str) -> nn.Module | None:
    """The list of another's parametrizations whose original is our product."""
    if name not in sites.parametrized(module):
        return None
    inside = module.get_submodule(f"parametrizations.{name}")
    return inside if any(_is_product(p) for p in _chain(inside, "original")) else None


def _chain(module: nn.Module, name: str) -> list[nn.Module]:
    if name not in sites.parametrized(module):
        return []
    return list(module.get_submodule(f"parametrizations.{name}").children())


def _is_product(parametrization: nn.Module) -> bool:
    return getattr(parametrization, "regwrap_product", False)


def _take_mask(module: nn.Module, name: str) -> None:
    chain = _chain(module, name)
    kept = [p for p in chain if not getattr(p, "regwrap_mask", False)]
    if len(kept) == len(chain):
        return
    if not kept:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        return
    inside = module.get_submodule(f"parametrizations.{name}")
    for key in [k for k, p in inside._modules.items() if getattr(p, "regwrap_mask", False)]:
        del inside._modules[key]


def _take_product(module: nn.Module, name: str) -> None:
    inside = _beneath(module, name)
    if inside is not None:
        _take_product(inside, "original")
        _tidy(inside)
    elif any(map(_is_product, _chain(module, name))):
        learns = any(p.requires_grad for p in sites.stored(module, name))
        with torch.no_grad():
            effective = getattr(module, name)
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        module._parameters[name] = nn.Parameter(effective, requires_grad=learns)
        module.__dict__.pop(name, None)


def _tidy(module: nn.Module) -> None:
    """Puts the parameters back in their order, and takes the hooks when nothing is left."""
    if _ORDER not in module.__dict__ or any(True for _ in sites.parametrized(module)):
        return
    order = {name: i for i, name in enumerate(module.__dict__.pop(_ORDER))}
    ranked = sorted(module._parameters.items(), key=lambda item: order.get(item[0], len(order)))
    module._parameters.clear()
    module._parameters.update(ranked)
    hook: Any = HOOK
    module._state_dict_hooks.pop(hook, None)
    module._load_state_dict_pre_hooks.pop(hook, None)


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
    """A state_dict hook: effective weights under their plain names, in the plain order."""
    for name in sites.parametrized(module):
        inner = f"{prefix}parametrizations.{name}."
        if _only_ours(module, name):
            held = [state.pop(key) for key in list(state) if key.startswith(f"{inner}original")]
            state[f"{prefix}{name}"] = held[0] if len(held) == 1 else held[0] * held[1]
    mine = [f"{prefix}{name}" for name in module.__dict__[_ORDER] if f"{prefix}{name}" in state]
    rest = [k for k in state if k.startswith(prefix) and k not in mine]
    for key in (*mine, *rest):
        state[key] = state.pop(key)


def load_plain(
    module: nn.Module, state: dict[str, Any], prefix: str, *others: Any, **more: Any
) -> None:
    """A load_state_dict pre-hook: plain names back into the parametrizations' own."""
    for name in sites.parametrized(module):
        key = f"{prefix}{name}"
        if key in state and _only_ours(module, name):
            inner = f"{prefix}parametrizations.{name}.original"
            weight = state.pop(key)
            if any(map(_is_product, _chain(module, name))):
                state[f"{inner}0"], state[f"{inner}1"] = Product().right_inverse(weight)
            else:
                state[inner] = weight


def _only_ours(module: nn.Module, name: str) -> bool:
    return not sites.is_foreign(module, name)
