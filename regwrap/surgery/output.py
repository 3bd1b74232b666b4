"""Hooks on a layer: they drop its output, penalise it, or mark the layer as called.

All of them are module-level functions under fixed keys with their state on the module: no closure
that a copy would share, no integer id that another process would give out again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Tuple  # noqa: UP035 - TorchScript knows no other name for it

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from regwrap import record
from regwrap.errors import PolicyError
from regwrap.record import HOOK
from regwrap.seen import ROUND, SEEN, Round, Seen
from regwrap.terms import Dropout, Timed

_RATE = "_regwrap_p"
_SEE: Any = f"{HOOK}.output"  # Any: torch's annotations know integer keys only
_BEGIN: Any = f"{HOOK}.begin"
_END: Any = f"{HOOK}.end"


def sync(module: nn.Module) -> bool:
    """Gives the module the hooks that its record asks for; whether any came or went."""
    marks = [mark for mark in record.read(module).marks if mark.mechanism == "hook"]
    rates = [mark.term.p for mark in marks if isinstance(mark.term, Dropout)]
    sees = any(isinstance(mark.term, Timed) for mark in marks)
    before = set(module._forward_hooks)
    for key in (_SEE, HOOK):
        module._forward_hooks.pop(key, None)
    module.__dict__.pop(_RATE, None)
    held = module.__dict__.pop(SEEN, None)
    if sees:  # before the dropout: what is penalised is the layer's own output
        module.__dict__[SEEN] = held or Seen()
        module._forward_hooks[_SEE] = see_output
    if rates:
        module.__dict__[_RATE] = rates[0]
        module._forward_hooks[HOOK] = drop_output
    return before != set(module._forward_hooks)


def sync_root(root: nn.Module) -> bool:
    """Gives the root the hooks that begin and end a forward, if anything beneath it needs them."""
    needed = any(SEEN in module.__dict__ for module in root.modules())
    present = ROUND in root.__dict__
    root.__dict__.pop(ROUND, None)
    root._forward_pre_hooks.pop(_BEGIN, None)
    root._forward_hooks.pop(_END, None)
    root._forward_hooks_always_called.pop(_END, None)
    if needed:
        root.__dict__[ROUND] = Round()
        root._forward_pre_hooks[_BEGIN] = begin_forward
        root._forward_hooks[_END] = end_forward
        root._forward_hooks_always_called[_END] = True  # an exception ends a forward too
    return needed != present


def drop_output(module: nn.Module, args: Tuple[Tensor], output: Tensor) -> Tensor:  # noqa: UP006
    """A forward hook, as TorchScript takes it: dropout at the layer's rate in training."""
    # Asking first and calling with a constant is the cheapest form (1.14 of a plain eval of small
    # layers, where a Dropout module costs 1.28).
    if module.training:
        return F.dropout(output, module._regwrap_p, True)  # type: ignore[arg-type]
    return output


def see_output(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: keeps the penalties of the output, and that the module was called."""
    seen: Seen = module.__dict__[SEEN]
    recording = module.training and torch.is_grad_enabled()
    compiling = torch.compiler.is_compiling()
    if recording and not compiling and _in_backward():
        # Non-reentrant checkpointing calls again in the backward and counts what autograd saves:
        # the same is computed, and nothing recorded.
        _penalties(module, output)
        return
    if not compiling:
        seen.about_to_record(type(module).__name__)
    seen.called = True
    if recording:
        seen.values = seen.values + _penalties(module, output)
    elif module.training and not compiling and _in_reentrant_checkpoint():
        raise PolicyError(
            f"The output of {type(module).__name__} cannot be penalised inside reentrant "
            "checkpointing, whose forward has no gradient; call "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
        )


def _penalties(module: nn.Module, output: Any) -> list[tuple[tuple[str, ...], Tensor]]:
    """Summed over the features, averaged over the batch, as Keras does."""
    found = []
    for mark in record.read(module).marks:
        if isinstance(mark.term, Timed) and mark.term.on == "output":
            tensor = _selected(module, output, mark.term.select)
            batch = tensor.shape[0] if tensor.dim() else 1
            found.append((mark.term.family, mark.term.value(tensor) / max(batch, 1)))
    return found


def _selected(module: nn.Module, output: Any, select: str | int | None) -> Tensor:
    """The tensor that is penalised: the first one, or what `select=` names."""
    found = _first_tensor(output) if select is None else _at(output, select)
    if not isinstance(found, Tensor):
        name = type(module).__name__
        raise PolicyError(
            f"The output of {name} has no tensor to penalise"
            f"{'' if select is None else f' at select={select!r}'}: it is {type(output).__name__}; "
            "name it with select=, a key or an index."
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
    else:
        inner = vars(output).values() if hasattr(output, "__dataclass_fields__") else ()
    return next((t for t in map(_first_tensor, inner) if t is not None), None)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _in_reentrant_checkpoint() -> bool:
    # Looked for only in training without grad, where a frame walk costs nothing that matters.
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def begin_forward(root: nn.Module, args: Any) -> None:
    """A forward pre-hook of the root: what the last forward left is forgotten."""
    held: Round = root.__dict__[ROUND]
    held.begin(root)


def end_forward(root: nn.Module, args: Any, output: Any) -> None:
    """A forward hook of the root, the inverse of `begin_forward`."""
    held: Round | None = root.__dict__.get(ROUND)
    if held is not None:
        held.end(root)
