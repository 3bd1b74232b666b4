"""Monte Carlo dropout: predictions with dropout on and everything else in eval."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regwrap.errors import PolicyError
from regwrap.penalty import settled
from regwrap.record import HOOK, Factor


class MCPrediction(NamedTuple):
    """What `mc_predict` returns; entropies are in nats, None for regression."""

    # torch.Tensor, not Tensor: tools that read a NamedTuple look for its names elsewhere
    mean: torch.Tensor
    """Of the probabilities, or of the outputs for regression."""
    std: torch.Tensor
    """Their sample standard deviation over the n passes."""
    entropy: torch.Tensor | None
    """Of the mean: the total uncertainty."""
    mutual_information: torch.Tensor | None
    """The entropy less the passes' mean entropy: the model's share of it, >= 0."""


@contextlib.contextmanager
def mc_dropout(model: nn.Module) -> Iterator[None]:
    """Within it dropouts act and everything else, BatchNorm above all, is in eval.

    Dropout layers, the `dropout` of MultiheadAttention, LSTM, GRU and RNN, and whatever dropout
    `regularize` put in; not a functional dropout in the model's own source, which asks its module's
    mode. Every module's mode comes back, also after an exception.

    Args:
        model: in any mode.

    Raises:
        PolicyError: when no dropout of the model has a rate above 0.

    Source: Gal and Ghahramani, Dropout as a Bayesian approximation (2016).
    """
    settled(model)
    modules = list(model.modules())
    dropping = {id(m) for m in modules if _drops(m)}
    if not dropping:
        raise PolicyError(
            f"{type(model).__name__} has no dropout with a rate above 0, so that every pass would "
            "be the same; add one with regularize(model, Dropout(0.1)), or train with one."
        )
    modes = [(m, m.training) for m in modules]
    buffers = _buffers([m for m in modules if id(m) in dropping])
    records = _records(modules)
    try:
        for module, _ in modes:
            _set(module, id(module) in dropping or _bypasses(module, dropping))
        yield
    finally:
        for module, mode in modes:
            _set(module, mode)
        _put_back(buffers)
        for held, before in records:
            held.clear()
            held.update(before)


def mc_predict(
    model: nn.Module, *args: Any, n: int = 30, task: str = "classification", **kwargs: Any
) -> MCPrediction:
    """The mean and spread of n passes with dropout on, without gradient.

    Reproducible under `torch.manual_seed`. It tells how far to trust a prediction only as well as
    dropout models the weights' uncertainty: it is no reliable detector of foreign inputs.

    Args:
        model: with a dropout somewhere, in any mode.
        *args: what the model is called with.
        n: passes, >= 2.
        task: `"classification"` takes logits over the last dimension (of a dict or ModelOutput its
            `logits`), `"binary"` one logit, `"regression"` the outputs as they are.
        **kwargs: what the model is called with.

    Shape:
        `mean`, `std`: as the output; the entropies of a classification without its last dimension,
        of a binary one as the output.

    Raises:
        PolicyError: for a model without dropout, or outputs that do not fit the task.
        ValueError: for another task or n.

    Source: Gal and Ghahramani (2016); Houlsby et al., Bayesian active learning (2011).
    """
    if task not in _TASKS:
        raise ValueError(f"mc_predict: task must be one of {tuple(_TASKS)}, not {task!r}.")
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"mc_predict: n must be an integer >= 2, not {n!r}: one has no spread.")
    read, entropy = _TASKS[task]
    with mc_dropout(model), torch.no_grad():
        return _moments(
            (read(_logits(model(*args, **kwargs)), (*args, *kwargs.values())) for _ in range(n)),
            entropy,
        )


def _moments(passes: Iterator[Tensor], entropy: Callable[[Tensor], Tensor] | None) -> MCPrediction:
    """Mean and spread, pass by pass (Welford): n whole outputs may not fit into memory."""
    mean = next(passes)
    squares, entropies, count = torch.zeros_like(mean), [entropy(mean)] if entropy else [], 1
    for count, value in enumerate(passes, 2):
        away = value - mean
        mean = mean + away / count
        squares += away * (value - mean)
        if entropy:
            entropies[0] = entropies[0] + entropy(value)
    std = (squares / (count - 1)).sqrt()
    if entropy is None:
        return MCPrediction(mean, std, None, None)
    total = entropy(mean)
    return MCPrediction(mean, std, total, (total - entropies[0] / count).clamp_min(0))


# --- what the tasks read of an output -------------------------------------------------------------


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise PolicyError(
            "mc_predict needs a tensor, or a dict or ModelOutput with 'logits', as the model's "
            f"output, not {type(output).__name__}; wrap the model to return one."
        )
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _probabilities(logits: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    shape = tuple(logits.shape)
    batch = any(isinstance(x, Tensor) and x.dim() > 1 and len(x) == len(logits) for x in inputs)
    if not shape or shape[-1] == 1 or (len(shape) == 1 and batch):
        raise PolicyError(
            "mc_predict(task='classification') needs a logit a class over the last dimension, not "
            f"one logit (shape {shape}); write task='binary', or 'regression'."
        )
    return logits.softmax(-1)


def _probability(logits: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    if logits.dim() > 1 and logits.shape[-1] != 1:
        raise PolicyError(
            f"mc_predict(task='binary') needs one logit, not shape {tuple(logits.shape)}; write "
            "task='classification'."
        )
    return logits.sigmoid()


def _as_it_is(output: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    return output


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy


def _binary_entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy


_Read = Callable[[Tensor, tuple[Any, ...]], Tensor]
_TASKS: dict[str, tuple[_Read, Callable[[Tensor], Tensor] | None]] = {
    "classification": (_probabilities, _entropy),
    "binary": (_probability, _binary_entropy),
    "regression": (_as_it_is, None),
}


# --- which modules drop --------------------------------------------------------------------------


def _drops(module: nn.Module) -> bool:
    """Whether the module itself drops something in training."""
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout > 0) and module.num_layers > 1
    return (_is_dropout(module) or _is_hooked(module)) and not _is_off(module)


def _is_off(module: nn.Module) -> bool:
    """Whether a schedule holds the module's dropout at 0."""
    held = (module.__dict__.get(name) for name in ("factor", "_regwrap_factor"))
    return any(isinstance(factor, Factor) and factor.value == 0 for factor in held)


def _is_dropout(module: nn.Module) -> bool:
    """Any Dropout, also timm's DropPath, and the mask of a DropConnect."""
    named = "drop" in type(module).__name__.lower() or hasattr(module, "regwrap_mask")
    rates = [getattr(module, name, None) for name in ("p", "drop_prob", "rate")]
    numbers = [r for r in rates if isinstance(r, float | int | Tensor)]  # a schedule's is a tensor
    return named and not module._modules and any(bool(r > 0) for r in numbers)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook of ours drops something at the module, which asks the module's own mode."""
    return HOOK in module._forward_hooks or HOOK in module._forward_pre_hooks


def _bypasses(module: nn.Module, dropping: set[int]) -> bool:
    """Whether in eval the module runs fused code that leaves out the dropouts beneath it."""
    fused = isinstance(module, nn.TransformerEncoderLayer)  # silently, where a user would not look
    return fused and any(id(m) in dropping for m in module.modules())


def _set(module: nn.Module, mode: bool) -> None:
    # Not train(): a model may override it, to freeze its BatchNorms; nor __setattr__ where the mode
    # lies in the module's dict, as everywhere but in a ScriptModule.
    if "training" in module.__dict__:
        module.__dict__["training"] = mode
    else:
        module.training = mode


def _buffers(modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Each buffer with a copy: the old spectral_norm moves its own when its layer trains."""
    held = (b for m in modules for b in m._buffers.values() if b is not None)
    return [(buffer, buffer.clone()) for buffer in held]


def _records(modules: list[nn.Module]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the last forward left for penalties on outputs, with a copy: passes would clear it."""
    found = (m.__dict__.get("_regwrap_seen") for m in modules)
    return [(vars(seen), dict(vars(seen))) for seen in found if seen is not None]


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
