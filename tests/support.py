"""What tests compare: outputs bit for bit, models down to their hooks, plain against regularized.

The laws say "whatever the plain model passes, the regularized one passes". What "passes" means is a
function in `CHECKS`, the same for both; write a law as

    failure = failure_of(what, regularize(case.build(), rules), case)
    assert failure is None or not plain_passes(case, what), failure

so that the plain model is tried only where the regularized one failed.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import inspect
import io
import multiprocessing
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from zoo import BY_NAME, Case

torch.set_num_threads(1)  # on models this small threads wait for each other: 10 times slower

Bits = tuple[str, str, tuple[int, ...], bytes | str]

# ---- outputs ---------------------------------------------------------------------------------


def leaves(output: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested output that is no container, each with its path in it."""
    if isinstance(output, Mapping):
        for key, value in output.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            yield from leaves(value, f"{path}[{index}]")
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from leaves(getattr(output, field.name), f"{path}.{field.name}")
    elif output is None or isinstance(output, (Tensor, bool, int, float, str)):
        yield path, output
    else:
        raise TypeError(f"an output of type {type(output).__name__} at {path or 'the root'}")


def flat_tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    return [leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor)]


def bits(tensor: Tensor) -> Bits:
    """A tensor as plain data, equal only if type, dtype, shape and every bit are."""
    kind = type(tensor).__name__
    if is_lazy(tensor):
        return kind, str(tensor.dtype), (), "uninitialized"
    head = (kind, str(tensor.dtype), tuple(tensor.shape))
    if tensor.is_meta:
        return *head, "meta"
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    plain = dense.as_subclass(Tensor).resolve_conj().resolve_neg().contiguous()
    return *head, plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(output: Any) -> list[tuple[str, Any]]:
    """A nested output as plain data: comparable, picklable, holding no tensor."""
    return [("", type(output).__name__)] + [
        (path, bits(leaf) if isinstance(leaf, Tensor) else leaf) for path, leaf in leaves(output)
    ]


def same_outputs(left: Any, right: Any) -> bool:
    """Whether two outputs have one structure and are equal bit for bit (NaN is NaN, 0 not -0)."""
    return digest(left) == digest(right)


def close_outputs(left: Any, right: Any) -> bool:
    """Whether two outputs have equal tensors up to rounding; their containers may differ."""
    pairs = list(zip(flat_tensors(left), flat_tensors(right), strict=True))
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    return all(a.is_meta or torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def loss_of(output: Any) -> Tensor:
    """A loss with a gradient for every element of every floating or complex tensor in an output."""
    loss = torch.zeros(())
    for tensor in flat_tensors(output):
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.is_floating_point():
            flat = tensor.reshape(-1).to(torch.promote_types(tensor.dtype, torch.float32))
            # unequal weights: a plain sum has gradient zero behind a softmax or a norm
            slope = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype))
            loss = loss.to(flat.device) + (flat * slope + flat.square() / 2).sum()
    return loss


# ---- running ---------------------------------------------------------------------------------


def run(model: nn.Module, case: Case, *, train: bool | None = None, seed: int = 1) -> Any:
    """The model's output for the case's input under a seed; `train=None` leaves the modes alone."""
    args, kwargs = case.inputs()
    if train is not None:
        model.train(train)
    torch.manual_seed(seed)
    return model(*args, **kwargs)


def gradients(model: nn.Module, case: Case, **how: Any) -> dict[str, Tensor | None]:
    """The gradient that `loss_of` gives every parameter, all of them made afresh."""
    take_gradients(model)
    backward(run(model, case, **how))
    return take_gradients(model)


def backward(output: Any) -> None:
    """Backward of `loss_of(output)`, if anything in it is differentiable."""
    loss = loss_of(output)
    if loss.requires_grad:
        loss.backward()


def take_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradient of every parameter, which is None afterwards."""
    leafs = {name: p for name, p in named_parameters(model) if p.is_leaf}
    found = {name: parameter.grad for name, parameter in leafs.items()}
    for parameter in leafs.values():
        parameter.grad = None
    return found


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every name of every parameter, whatever the model overrides."""
    return list(nn.Module.named_parameters(model, remove_duplicate=False))


# ---- everything there is to see about a model ------------------------------------------------


class Same:
    """Compares by identity; holds the object, whose id could otherwise pass to another one."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.held is other.held

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{type(self.held).__name__} at {id(self.held):#x}>"


def fingerprint(model: nn.Module, *, identity: bool = True) -> dict[str, Any]:
    """Everything observable about a model, as data that compares with `==`.

    Sections: `class`, `signature`, `length`, `repr`, `children`, `state_dict` (with order and
    metadata), `parameters`, `buffers`, `modules` (of each module its class and MRO, `__dict__` in
    order with every hook, slots). Two are compared by `differences`. With `identity` False objects
    compare by what they are, not by which they are: for a copy, or for one build and another.
    """
    state = model.state_dict()
    return {
        "class": (type(model).__name__, type(model).__qualname__, type(model).__module__),
        "signature": str(inspect.signature(model.forward)),
        "length": len(model) if hasattr(type(model), "__len__") else None,
        "repr": repr(model),
        "children": [
            (name, _seen(child, identity)) for name, child in nn.Module.named_children(model)
        ],
        "state_dict": [(key, _seen(value, False)) for key, value in state.items()],
        "metadata": repr(getattr(state, "_metadata", None)),
        "parameters": [(n, _tensor(p, identity)) for n, p in model.named_parameters()],
        "all_parameters": [(n, _tensor(p, identity)) for n, p in named_parameters(model)],
        "buffers": [(n, _tensor(b, identity)) for n, b in model.named_buffers()],
        "modules": {
            path: _module(module, identity)
            for path, module in nn.Module.named_modules(model, remove_duplicate=False)
        },
    }


def _module(module: nn.Module, identity: bool) -> dict[str, Any]:
    """One module by itself: its class, its attributes in order, its slots."""
    cls = type(module)
    slots = [
        name
        for base in cls.__mro__
        for name in vars(base).get("__slots__", ())
        if hasattr(module, name)
    ]
    return {
        "mro": [(f"{base.__module__}.{base.__qualname__}", _found(base)) for base in cls.__mro__],
        # copyreg caches __slotnames__ on any class that is copied once
        "class_names": [name for name in vars(cls) if name != "__slotnames__"],
        "attributes": [(key, _seen(value, identity)) for key, value in vars(module).items()],
        "slots": [(name, _seen(getattr(module, name), identity)) for name in slots],
    }


def _found(cls: type) -> bool:
    """Whether a class is the one its name leads to, no look-alike made at run time."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def _tensor(tensor: Tensor, identity: bool) -> dict[str, Any]:
    grad = tensor.grad if tensor.is_leaf else None
    return {
        "which": Same(tensor) if identity else None,
        "bits": bits(tensor),
        "requires_grad": tensor.requires_grad,
        "grad": None if grad is None else (Same(grad) if identity else bits(grad)),
        "attributes": [(key, repr(value)) for key, value in vars(tensor).items()],
        "hooks": [
            list(getattr(tensor, name, None) or ())
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
        ],
    }


def _seen(value: Any, identity: bool, inside: tuple[int, ...] = ()) -> Any:
    """A value as comparable data: containers opened, modules and unknown objects by identity."""
    if id(value) in inside:
        return "a cycle"
    inside = (*inside, id(value))
    if isinstance(value, Tensor):
        return _tensor(value, identity)
    if isinstance(value, dict):
        return type(value).__name__, [
            (repr(key), _seen(item, identity, inside)) for key, item in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_seen(item, identity, inside) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(map(repr, value))
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype)):
        return repr(value)
    if identity:
        return Same(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def differences(before: Any, after: Any, path: str = "") -> list[str]:
    """One line for each place where two fingerprints differ."""
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict) and list(before) == list(after):
        pairs = [(key, before[key], after[key]) for key in before]
    elif type(before) is type(after) and isinstance(before, (list, tuple)):
        if len(before) != len(after):
            return [f"{path}: {len(before)} entries, now {len(after)}: {_new(before, after)}"]
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(before, after, strict=True))]
    else:
        return [f"{path}: {str(before)[:200]}, now {str(after)[:200]}"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{path}/{key}")]


def _new(before: Any, after: Any) -> str:
    lost = [str(entry)[:80] for entry in before if entry not in after]
    new = [str(entry)[:80] for entry in after if entry not in before]
    return f"lost {lost}, new {new}"


# ---- what a model passes ---------------------------------------------------------------------


def _twins(model: nn.Module, other: nn.Module, case: Case) -> None:
    """Two models that share nothing behave as one, in both modes, gradients included."""
    assert type(other).__name__ == type(model).__name__
    modes = [(name, module.training) for name, module in model.named_modules()]
    assert modes == [(name, module.training) for name, module in other.named_modules()]
    mine = {id(p) for _, p in named_parameters(model)}
    assert not mine & {id(p) for _, p in named_parameters(other)}
    assert digest(dict(model.state_dict())) == digest(dict(other.state_dict()))
    for train in (False, True):
        assert same_outputs(run(model, case, train=train), run(other, case, train=train))
        assert digest(gradients(model, case)) == digest(gradients(other, case))


def _deepcopy(model: nn.Module, case: Case) -> None:
    _twins(model, copy.deepcopy(model), case)


def _deepcopy_mid_step(model: nn.Module, case: Case) -> None:
    """Between forward and backward: the copy runs, and the original's backward still works."""
    output = run(model, case, train=True)
    other = copy.deepcopy(model)
    backward(output)
    take_gradients(model)
    for train in (True, False):
        assert same_outputs(run(model, case, train=train), run(other, case, train=train))


def _pickle(model: nn.Module, case: Case) -> None:
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        _twins(model, pickle.loads(pickle.dumps(model, protocol)), case)


def _torch_save(model: nn.Module, case: Case) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    _twins(model, torch.load(file, weights_only=False), case)


def _spawn(model: nn.Module, case: Case) -> None:
    """Unpickled in another process it gives the same outputs and gradients."""
    theirs = new_process().submit(_outputs_of_pickle, pickle.dumps(model), case.name).result()
    assert _outputs(model, case) == theirs


def _load_both_ways(model: nn.Module, case: Case) -> None:
    """Its `state_dict` loads strictly into a plain model, and the plain model's into it."""
    plain = case.build()
    for each in (model, plain):
        run(each, case, train=False)  # lazy parameters and late layers exist from here on
    for source, target in ((model, plain), (plain, model)):
        for _, parameter in named_parameters(source):
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.data.mul_(1.5)
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(copy.deepcopy(source.state_dict()), strict=True)
        assert digest(dict(source.state_dict())) == digest(dict(target.state_dict()))
        assert same_outputs(run(source, case, train=False), run(target, case, train=False))


def _functional_call(model: nn.Module, case: Case) -> None:
    """Called with clones of its tensors it gives the same output, its gradient to the clones."""
    run(model, case, train=False)
    own = dict(model.named_parameters())
    clones = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in own.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = case.inputs()
    torch.manual_seed(1)
    output = torch.func.functional_call(model, {**clones, **buffers}, args, kwargs)
    assert same_outputs(run(model, case), output)
    wanted = gradients(model, case)
    backward(output)
    assert all(digest(clones[n].grad) == digest(wanted[n]) for n in clones)
    assert all(p.grad is None for p in own.values())


def _compile(model: nn.Module, case: Case) -> None:
    """One graph (`aot_eager`) in eval and in training, gradients for the same parameters."""
    run(model, case, train=False)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for train in (False, True):
        model.train(train)
        eager = run(model, case)
        args, kwargs = case.inputs()
        torch.manual_seed(1)
        output = compiled(*args, **kwargs)
        assert close_outputs(eager, output)
        wanted = {name for name, grad in gradients(model, case).items() if grad is not None}
        backward(output)
        found = {name for name, grad in take_gradients(model).items() if grad is not None}
        assert wanted == found


def _export(model: nn.Module, case: Case) -> None:
    """`torch.export` of the model in eval computes what the model does."""
    run(model, case, train=False)
    args, kwargs = case.inputs()
    program = torch.export.export(model, args, kwargs)
    assert close_outputs(run(model, case), run(program.module(), case))


def _script(model: nn.Module, case: Case) -> None:
    """`torch.jit.script` of the model in eval computes what the model does."""
    scripted = torch.jit.script(model.eval())
    assert close_outputs(run(model, case), run(scripted, case))


CHECKS: dict[str, Callable[[nn.Module, Case], None]] = {
    "deepcopy": _deepcopy,
    "deepcopy_mid_step": _deepcopy_mid_step,
    "pickle": _pickle,
    "torch_save": _torch_save,
    "spawn": _spawn,
    "load_both_ways": _load_both_ways,
    "functional_call": _functional_call,
    "compile": _compile,
    "export": _export,
    "script": _script,
}


# Warnings of torch about its own code, which would hide what a check is after.
NOT_OURS = (
    r"The \.grad attribute of a Tensor that is not a leaf",  # dynamo reads it
    r"The tensor attributes .*_flat_weights",  # nn.LSTM under export
    r"`torch\.jit\.script` is deprecated",
)


def failure_of(what: str, model: nn.Module, case: Case) -> str | None:
    """Why a model fails a check, in one line, or None. The model is used up."""
    try:
        with warnings.catch_warnings():
            for text in NOT_OURS:
                warnings.filterwarnings("ignore", text)
            CHECKS[what](model, case)
    except Exception as error:  # whatever the model's classes or torch raise is the finding
        text = str(error).strip() or "an assertion of the check"
        return f"{case.name} fails {what}: {type(error).__name__}: {text.splitlines()[0]}"
    return None


@functools.cache
def plain_failure(name: str, what: str) -> str | None:
    """Why the plain model of that name fails a check, or None; tried once a process."""
    return failure_of(what, BY_NAME[name].build(), BY_NAME[name])


def plain_passes(case: Case, what: str) -> bool:
    """Whether the plain model of a case passes a check."""
    return plain_failure(case.name, what) is None


# ---- another process -------------------------------------------------------------------------


@functools.cache
def new_process() -> ProcessPoolExecutor:
    """One spawned process, kept for the session: it imported the zoo, and built nothing of ours."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    atexit.register(pool.shutdown, cancel_futures=True)
    return pool


def _outputs(model: nn.Module, case: Case) -> list[Any]:
    return [
        digest(found)
        for train in (False, True)
        for found in (run(model, case, train=train), gradients(model, case))
    ]


def _outputs_of_pickle(pickled: bytes, name: str) -> list[Any]:
    return _outputs(pickle.loads(pickled), BY_NAME[name])
