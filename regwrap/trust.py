"""Shows the guarantees on the user's own model and input."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from regwrap import penalty, planning, record, sites, surgery, table
from regwrap.graph import joined
from regwrap.planning.dropouts import rate_of
from regwrap.terms import L1, L2, Dropout

_SEED = 20
_RATE = 0.5  # a small one may drop nothing of a small input
_TRIED = 32  # dropouts a model: each takes two copies and two forwards


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


@dataclass(frozen=True)
class _Dial:
    """One dropout of a model, its own or ours: where its rate is set, and what runs it."""

    path: str
    runs: nn.Module
    is_ruled: bool
    turn: Callable[[float], None]


def _dials(model: nn.Module) -> Iterator[_Dial]:
    ours = {id(m._modules[name]) for m in model.modules() for name in sites.inserted(m)}
    for path, module in model.named_modules():
        if id(module) in ours:
            continue
        name = rate_of(module)
        if name is not None:
            yield _Dial(path, module, _is_ruled(module), partial(_set_rate, module, name))
        if "_regwrap_p" in vars(module):
            yield _Dial(path, module, True, partial(_set_hook, module))
        if hasattr(type(module), "regwrap_mask"):
            yield _Dial(path, module, True, partial(_set_rate, module, "p"))
        for name in sites.inserted(module):
            yield _Dial(joined(path, name), module, True, partial(_set_child, module, name))


def _set_rate(module: nn.Module, name: str, rate: float) -> None:
    vars(module)[name] = rate
    if "factor" in vars(module):  # of a schedule
        vars(module)["factor"] = record.Factor(1.0)


def _set_hook(layer: nn.Module, rate: float) -> None:
    held = vars(layer)
    held["_regwrap_p"] = rate
    if "_regwrap_kind" in held:
        held["_regwrap_kind"] = type(held["_regwrap_kind"])(rate)
    if "_regwrap_factor" in held:
        held["_regwrap_factor"] = record.Factor(1.0)


def _set_child(owner: nn.Module, name: str, rate: float) -> None:
    child = owner._modules[name]
    assert child is not None
    attribute = rate_of(child)
    if attribute is not None:
        _set_rate(child, attribute, rate)
    else:  # a kind that keeps its rate in its own way
        owner._modules[name] = type(child)(rate).train(child.training)


def _silenced(model: nn.Module) -> nn.Module:
    """The model with every dropout at rate 0, its own and ours."""
    for dial in list(_dials(model)):
        dial.turn(0.0)
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
    still = {e.path for e in planning.in_force(case.model) if e.note.startswith("without effect")}
    silent = _silenced(case.ours().train())
    ruled = [i for i, d in enumerate(_dials(case.model)) if d.is_ruled and d.path not in still]
    if not ruled:
        return True, "the policy has no dropout in force"
    tried = ruled[:: -(-len(ruled) // _TRIED)]
    found = [_acts(case, silent, index) for index in tried]
    told = f"{len(tried)} of {len(ruled)} dropouts, each alone at rate {_RATE}"
    for what, paths in (
        ("without effect", [path for path, ran, acts in found if ran and not acts]),
        ("not run by this input", [path for path, ran, acts in found if not ran]),
    ):
        told += f"; {what}: {', '.join(paths[:3])}" if paths else ""
    return all(acts or not ran for _, ran, acts in found), told


def _acts(case: _Case, silent: nn.Module, index: int) -> tuple[str, bool, bool]:
    """A dropout's path, whether it was reached, and whether it alone changes what comes out."""
    models = [copy.deepcopy(silent), copy.deepcopy(silent)]
    dial = list(_dials(models[0]))[index]
    dial.turn(_RATE)
    ran: list[bool] = []
    dial.runs.register_forward_pre_hook(lambda *_: ran.append(True))
    with torch.no_grad():
        dropped, plain = (case.run(model) for model in models)
    return dial.path, bool(ran), not _same(dropped, plain)


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
    before = planning.in_force(case.ours())  # of a copy: no attachment survives one
    same = planning.in_force(loaded) == before
    return same, f"the policy of {len(before)} entries after a round trip"


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
