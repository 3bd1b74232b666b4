"""Hooks on a layer: they drop its output, penalise it, or mark the layer as called.

All of them are module-level functions under fixed keys with their state on the module: no closure
that a copy would share, no integer id that another process would give out again.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Tuple  # noqa: UP035 - TorchScript knows no other name for it

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from regwrap import record
from regwrap.errors import PolicyError
from regwrap.record import HOOK, Factor, Mark
from regwrap.seen import ROUND, SEEN, Round, Seen, Values
from regwrap.surgery import scheduled
from regwrap.terms import Dropout, Timed

_RATE = "_regwrap_p"
_KIND = "_regwrap_kind"
_FACTOR = "_regwrap_factor"
_SEE: Any = f"{HOOK}.output"  # Any: torch's annotations know integer keys only
_BEGIN: Any = f"{HOOK}.begin"
_END: Any = f"{HOOK}.end"


def sync(module: nn.Module) -> bool:
    """Gives the module the hooks that its record asks for; whether any came or went."""
    marks = [mark for mark in record.read(module).marks if mark.mechanism == "hook"]
    drops = next((mark for mark in marks if isinstance(mark.term, Dropout)), None)
    sees = any(isinstance(mark.term, Timed) for mark in marks)
    before = _keys(module)
    _keep(module, SEEN, Seen() if sees else None)
    _hook(module._forward_hooks, _SEE, see_output if sees else None)
    _sync_dropout(module, drops)
    if sees and HOOK in module._forward_hooks:  # what is penalised is the layer's own output
        _put_before(module._forward_hooks, _SEE, HOOK)
    return before != _keys(module)


def _keys(module: nn.Module) -> set[object]:
    """What compiled code has taken in and does not look at again."""
    hooks = {*module._forward_hooks.items(), *module._forward_pre_hooks.items()}
    return {*hooks, module.__dict__.get(_FACTOR)}


def _sync_dropout(module: nn.Module, mark: Mark | None) -> None:
    for key in (_RATE, _KIND, _FACTOR):
        module.__dict__.pop(key, None)
    before = after = at = None
    if mark is not None and isinstance(mark.term, Dropout):
        at = mark.term.at
        before, after = _prepare(module, mark.term, record.read(module).factor(mark))
    _hook(module._forward_pre_hooks, HOOK, before if at == "input" else None)
    _hook(module._forward_hooks, HOOK, None if at == "input" else after)


def _prepare(module: nn.Module, term: Dropout, factor: Factor | None) -> tuple[Any, Any]:
    """Puts what the hooks read on the module; the hook before the layer and the one behind it."""
    if factor is not None:
        module.__dict__[_FACTOR] = factor
    if term.kind is not nn.Dropout:  # beside the children, not among them: nobody's submodule
        module.__dict__[_KIND] = term.kind(term.p)
        module.__dict__[_RATE] = term.p
        return drop_input_by_kind, drop_output_by_kind
    module.__dict__[_RATE] = term.p
    if factor is not None:
        return drop_input_scheduled, drop_scheduled
    return drop_input, drop_output


def _keep(module: nn.Module, key: str, fresh: Any) -> None:
    """Gives the module the holder, unless it has one; None takes it away."""
    if fresh is None:
        module.__dict__.pop(key, None)
    else:
        module.__dict__.setdefault(key, fresh)


def _hook(hooks: Any, key: Any, hook: Any) -> None:
    """Puts the hook there, at its old place if there is one; None takes it away."""
    if hook is None:
        hooks.pop(key, None)
    else:
        hooks[key] = hook


def _put_before(hooks: Any, first: Any, second: Any) -> None:
    order = list(hooks)
    if order.index(first) > order.index(second):
        order.remove(first)
        order.insert(order.index(second), first)
        for key in order:
            hooks.move_to_end(key)


def sync_root(root: nn.Module) -> bool:
    """Gives the root the hooks that begin and end a forward, if anything beneath it needs them."""
    needed = any(SEEN in module.__dict__ for module in root.modules())
    present = ROUND in root.__dict__
    root._forward_pre_hooks.pop(_BEGIN, None)
    root._forward_hooks.pop(_END, None)
    root._forward_hooks_always_called.pop(_END, None)
    _keep(root, ROUND, Round() if needed else None)
    if needed:
        root._forward_pre_hooks[_BEGIN] = begin_forward
        # first: were another's to raise before it, a forward would end that has not begun
        root._forward_pre_hooks.move_to_end(_BEGIN, last=False)  # type: ignore[attr-defined]
        root._forward_hooks[_END] = end_forward
        root._forward_hooks_always_called[_END] = True  # an exception ends a forward too
    return needed != present


def drop_output(module: nn.Module, args: Tuple[Tensor], output: Tensor) -> Tensor:  # noqa: UP006
    """A forward hook, as TorchScript takes it: dropout at the layer's rate in training."""
    # Asking first and calling with a constant is the cheapest form (1.14 of a plain eval of small
    # layers, where a Dropout module costs 1.28).
    if module.training:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            _require_tensor(module, output)
        return F.dropout(output, module._regwrap_p, True)  # type: ignore[arg-type]
    return output


def drop_scheduled(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: dropout at the layer's rate times its factor of the moment."""
    if not module.training:
        return output
    _require_tensor(module, output)
    return scheduled.drop(output, module.__dict__[_RATE], module.__dict__[_FACTOR])


def drop_input_scheduled(module: nn.Module, args: Any) -> Any:
    """A forward pre-hook: the same before the layer."""
    if not module.training:
        return args
    _require_input(module, args)
    dropped = scheduled.drop(args[0], module.__dict__[_RATE], module.__dict__[_FACTOR])
    return (dropped, *args[1:])


def drop_input(module: nn.Module, args: Tuple[Tensor]) -> Tuple[Tensor]:  # noqa: UP006
    """A forward pre-hook, as TorchScript takes it: the same before the layer."""
    if module.training:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            _require_input(module, args)
            return (F.dropout(args[0], module._regwrap_p, True), *args[1:])  # type: ignore
        return (F.dropout(args[0], module._regwrap_p, True),)  # type: ignore[arg-type]
    return args


def drop_output_by_kind(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: a dropout of another class."""
    if not module.training:
        return output
    _require_tensor(module, output)
    return _kind_of(module)(output)


def drop_input_by_kind(module: nn.Module, args: Any) -> Any:
    """A forward pre-hook: a dropout of another class before the layer."""
    if not module.training:
        return args
    _require_input(module, args)
    return (_kind_of(module)(args[0]), *args[1:])


def _kind_of(module: nn.Module) -> nn.Module:
    kind: nn.Module = module.__dict__[_KIND]
    scheduled.set_rate(kind, module.__dict__[_RATE], module.__dict__.get(_FACTOR))
    return kind.train(module.training)


def _require_input(layer: nn.Module, args: Any) -> None:
    if not (args and isinstance(args[0], Tensor)):
        raise PolicyError(
            f"{type(layer).__name__} was called without a tensor as its first positional argument: "
            "a Dropout at='input' cannot act on it; write at='output'."
        )


def _require_tensor(layer: nn.Module, output: object) -> None:
    if not isinstance(output, Tensor):
        raise PolicyError(
            f"{type(layer).__name__} returned {type(output).__name__}, no tensor: a Dropout cannot "
            "act on it; leave the layer out with None."
        )


def see_output(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: keeps the penalties of the output, and that the module was called."""
    again = _is_again()
    recording = module.training and torch.is_grad_enabled()
    if again or torch.compiler.is_exporting():
        # Non-reentrant checkpointing calls again in the backward and counts what autograd saves:
        # the same is computed, and nothing recorded.
        if again and recording:
            _penalties(module, output)
        return
    seen: Seen = module.__dict__[SEEN]
    seen.about_to_record(type(module).__name__)
    seen.called = True
    if recording:
        seen.record(_penalties(module, output))
    elif module.training and _in_reentrant_checkpoint():
        _refuse_reentrant(module)


def _refuse_reentrant(module: nn.Module) -> None:
    if any(True for _ in _output_terms(module)):
        raise PolicyError(
            f"The output of {type(module).__name__} cannot be penalised inside reentrant "
            "checkpointing, whose forward has no gradient; call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def _penalties(module: nn.Module, output: Any) -> Values:
    """Summed over the features, averaged over the batch, as Keras does."""
    found = []
    for term in _output_terms(module):
        # a clone: the layer's output is what a ReLU(inplace=True) behind it overwrites
        tensor = _selected(module, output, term.select).clone()
        batch = tensor.shape[0] if tensor.dim() else 1
        found.append((term.family, term.value(tensor) / max(batch, 1)))
    return found


def _output_terms(module: nn.Module) -> Iterator[Timed]:
    for mark in record.read(module).marks:
        if isinstance(mark.term, Timed) and mark.term.on == mark.site == "output":
            yield mark.term


def _selected(module: nn.Module, output: Any, select: str | int | None) -> Tensor:
    """The tensor that is penalised: the first one, of the whole or of what `select=` names."""
    found = _first_tensor(output if select is None else _at(output, select))
    name = type(module).__name__
    if not isinstance(found, Tensor):
        raise PolicyError(
            f"The output of {name} has no tensor to penalise"
            f"{'' if select is None else f' at select={select!r}'}: it is {type(output).__name__}; "
            "name it with select=, a key or an index."
        )
    if not (found.is_floating_point() or found.is_complex()):
        raise PolicyError(
            f"The output of {name} has a tensor of {found.dtype} to penalise, which has no "
            "gradient; name another with select=, a key or an index."
        )
    return found


def _at(output: Any, select: str | int) -> Any:
    if isinstance(select, str) and not isinstance(output, Mapping):
        return getattr(output, select, None)
    try:
        return output[select]
    except (KeyError, IndexError, TypeError):
        return None


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        inner: Any = output.values()
    elif isinstance(output, tuple | list):
        inner = output
    elif dataclasses.is_dataclass(output):
        inner = (getattr(output, field.name) for field in dataclasses.fields(output))
    else:
        inner = ()
    return next((t for t in map(_first_tensor, inner) if t is not None), None)


def _is_again() -> bool:
    """Whether a backward is running, in which checkpointing calls the forward once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    if torch.compiler.is_compiling():
        return False
    # Looked for only in training without grad, where a frame walk costs nothing that matters.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def begin_forward(root: nn.Module, args: Any) -> None:
    """A forward pre-hook of the root: what the last forward left is forgotten."""
    if not _is_again() and not torch.compiler.is_exporting():
        root.__dict__[ROUND].begin(root)


def end_forward(root: nn.Module, args: Any, output: Any) -> None:
    """A forward hook of the root, the inverse of `begin_forward`."""
    held: Round | None = root.__dict__.get(ROUND)
    if held is not None and not _is_again() and not torch.compiler.is_exporting():
        held.end(root)
