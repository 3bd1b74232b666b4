"""Shows the guarantees on the user's own model and input."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regwrap import penalty, planning, record, sites, surgery, table
from regwrap.planning.dropouts import rate_of
from regwrap.terms import L1, L2, DropConnect, Dropout

_SEED = 20


@dataclass(frozen=True)
class Check:
    """One guarantee on one model: what was compared, and how it came out."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """What `verify` found; prints as a table with `rich.print`."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)

    def __rich__(self) -> Any:
        return table.draw_checks([(c.name, c.ok, c.detail) for c in self.checks])


@dataclass(frozen=True, eq=False)
class _Case:
    """The model under test, how to copy it, and one input."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def ours(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def plain(self) -> nn.Module:
        plain = copy.deepcopy(self.model)
        surgery.take_back(plain)
        return plain

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors of an output, from the same seed and from an input of its own."""
        args, kwargs = pytree.tree_map_only(Tensor, _fresh, (self.args, self.kwargs))
        torch.manual_seed(_SEED)
        return _tensors(model(*args, **kwargs))


def verify(model: nn.Module, *args: Any, compiled: bool = False, **kwargs: Any) -> Report:
    """Checks the guarantees on the model and one input of its forward.

    Works on copies: the model, its modes and the random state stay as they are.

    Args:
        model: a regularized model (a plain one passes too).
        *args: the input of its forward.
        compiled: whether `torch.compile` is tried too (slow).
        **kwargs: the input's keyword arguments.
    """
    root = penalty.settled(model)
    case = _Case(root, args, kwargs)
    checks = [*_CHECKS, *([("torch.compile", _compiles)] if compiled else [])]
    with _quietly():
        return Report([_checked(name, check, case) for name, check in checks])


@contextmanager
def _quietly() -> Iterator[None]:
    """Leaves the random state as it was, and lets gradients be compared under `no_grad` too."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        yield


def _checked(name: str, check: Callable[[_Case], tuple[bool, str]], case: _Case) -> Check:
    try:
        return Check(name, *check(case))
    except Exception as error:  # whatever the user's code raises is the finding
        return Check(name, False, f"{type(error).__name__}: {error}")


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _tensors(output: Any) -> list[Tensor]:
    if hasattr(output, "__dataclass_fields__") and not isinstance(output, dict):
        output = dict(vars(output))
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())
        for x, y in zip(a, b, strict=True)
    )


# --- the checks ---------------------------------------------------------------------------------


def _eval_identical(case: _Case) -> tuple[bool, str]:
    with torch.no_grad():
        ours, plain = case.run(case.ours().eval()), case.run(case.plain().eval())
    return _same(ours, plain), f"outputs bit for bit, {len(plain)} tensors, in eval"


def _train_identical(case: _Case) -> tuple[bool, str]:
    ours, plain = _silenced(case.ours().train()), _silenced(case.plain().train())
    outputs = [case.run(m) for m in (ours, plain)]
    gradients = [_gradients(m, out) for m, out in zip((ours, plain), outputs, strict=True)]
    shared = gradients[0].keys() & gradients[1].keys()  # a parametrized weight has another name
    same = _same(*outputs) and all(_equal(*(g[name] for g in gradients)) for name in shared)
    count = sum(gradients[1][name] is not None for name in shared)
    told = f"{len(outputs[1])} outputs and {count} gradients bit for bit"
    return same, f"{told}, in training with every dropout rate at 0"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _silenced(model: nn.Module) -> nn.Module:
    """The model with every dropout at rate 0, its own and ours."""
    for module in _alone(model).modules():
        held = vars(module)
        name = rate_of(module)
        if name is not None:
            held[name] = 0.0
        if "_regwrap_p" in held:
            held["_regwrap_p"] = 0.0
        if "_regwrap_kind" in held:
            held["_regwrap_kind"] = type(held["_regwrap_kind"])(0.0)
        for name in sites.inserted(module):
            child = module._modules[name]
            assert child is not None
            module._modules[name] = type(child)(0.0).train(child.training)
        if hasattr(type(module), "regwrap_mask"):
            held["p"] = 0.0
    return model


def _alone(model: nn.Module) -> nn.Module:
    """The model with its own dropouts at rate 0, and only those of the policy in force."""
    ours = {id(m._modules[name]) for m in model.modules() for name in sites.inserted(m)}
    for module in model.modules():
        name = None if id(module) in ours or _is_ruled(module) else rate_of(module)
        if name is not None:
            vars(module)[name] = 0.0
    return model


def _is_ruled(module: nn.Module) -> bool:
    """Whether the module's own rate is a rule's."""
    marks = record.read(module).marks
    return any(isinstance(m.term, Dropout) and m.mechanism == "direct" for m in marks)


def _gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor | None]:
    learned = [o.abs().sum() for o in outputs if o.requires_grad]
    if learned:
        torch.stack([value.float() for value in learned]).sum().backward()  # type: ignore[no-untyped-call]
    return {n: p.grad for n, p in model.named_parameters()}


def _drops(case: _Case) -> tuple[bool, str]:
    acting = [
        entry
        for entry in planning.in_force(case.model)
        if isinstance(entry.term, Dropout | DropConnect) and entry.mechanism and entry.term.p > 0
        if not entry.note.startswith("without effect")
    ]
    if not acting:
        return True, "the policy has no dropout in force"
    with torch.no_grad():
        # the model's own dropouts draw from the same stream, and would differ in any case
        dropped = case.run(_alone(case.ours().train()))
        silent = case.run(_silenced(case.ours().train()))
    told = f"{len(acting)} dropouts in force, outputs in training with them and without"
    return not _same(dropped, silent), told


def _state_untouched(case: _Case) -> tuple[bool, str]:
    ours, plain = case.ours(), case.plain()
    a, b = ours.state_dict(), plain.state_dict()
    same = list(a) == list(b) and _same(_tensors(dict(a)), _tensors(dict(b)))
    ours.load_state_dict(b, strict=True)
    plain.load_state_dict(a, strict=True)
    return same, f"{len(b)} keys, their order and values; loads both ways with strict=True"


def _undone(case: _Case) -> tuple[bool, str]:
    plain = case.plain()
    left = [key for module in plain.modules() for key in _ours_on(module)]
    classes = [type(module) for module in plain.modules()]
    ours = [c.__name__ for c in classes if issubclass(c, penalty.RegularizedMixin)]
    told = f"{len(classes)} modules of a copy after unregularize"
    return not left and not ours, told + (f"; left: {left[:3] + ours[:3]}" if left or ours else "")


def _ours_on(module: nn.Module) -> list[str]:
    """What regwrap keeps on a module: attributes, hooks, children."""
    hooks = (*module._forward_hooks, *module._forward_pre_hooks)
    attributes = [name for name in vars(module) if name.startswith("_regwrap")]
    hooked = [str(key) for key in hooks if str(key).startswith("regwrap")]
    return [*attributes, *hooked, *sites.inserted(module)]


def _pickles(case: _Case) -> tuple[bool, str]:
    try:
        pickle.dumps(case.plain())
    except Exception as error:
        return True, f"the plain model cannot be pickled either ({type(error).__name__})"
    loaded = pickle.loads(pickle.dumps(case.ours()))
    same = planning.in_force(loaded) == planning.in_force(case.model)
    return same, f"the policy of {len(planning.in_force(case.model))} entries after a round trip"


def _sums_right(case: _Case) -> tuple[bool, str]:
    model = case.ours()
    by_hand = [_by_hand(live) for live in penalty.live_terms(model)]
    total, found = math.fsum(by_hand), penalty.reg_loss(model).item()
    error = abs(found - total) / max(abs(total), 1e-30) if by_hand else abs(found)
    told = f"{found:.6g} against {total:.6g} in float64 over {len(by_hand)} terms"
    return error <= 1e-5 or math.isclose(found, total), f"{told}, relative error {error:.1e}"


def _by_hand(live: penalty.Live) -> float:
    """The formula in float64, not by the code that reg_loss takes."""
    if live.tensor is None or live.factors or not isinstance(live.term, L1 | L2):
        return live.value().item()
    w = live.tensor.detach().to(torch.complex128 if live.tensor.is_complex() else torch.float64)
    strength = live.term.strength * (1 if live.scheduled is None else live.scheduled.value)
    if isinstance(live.term, L1):
        return strength * w.abs().sum().item()
    return strength / 2 * w.abs().square().sum().item()


def _compiles(case: _Case) -> tuple[bool, str]:
    with torch.no_grad():
        model = case.ours().eval()
        eager = case.run(model)
        compiled = case.run(torch.compile(model))  # type: ignore[arg-type]
    close = all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(eager, compiled, strict=True))
    return close, f"{len(eager)} outputs in eval, compiled against eager, to 1e-4"


_CHECKS: list[tuple[str, Callable[[_Case], tuple[bool, str]]]] = [
    ("eval is untouched", _eval_identical),
    ("training at rate 0 is untouched", _train_identical),
    ("dropout acts", _drops),
    ("the checkpoint is untouched", _state_untouched),
    ("undo leaves no trace", _undone),
    ("pickling keeps the policy", _pickles),
    ("reg_loss is the formula", _sums_right),
]
