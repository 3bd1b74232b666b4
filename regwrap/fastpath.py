"""Sums of L1 and L2 penalties over many tensors, with their gradients, close to the memory's speed.

By hand, `sum(s * p.abs().sum() for p in parameters)`, a tensor costs seven dispatched operations,
each a fresh temporary or a node of its own. Here tensors go into *buckets*, and a bucket is one
`autograd.Function`: its value is computed in one small buffer, its gradients by `torch._foreach_*`.
`tests/benchmarks/penalty.py` prints what that is worth, with all that a read of `reg_loss` does.

The plain reductions, `plain_l1` and `plain_l2`, are what the fast path is tested against, and stand
in for it wherever it does not apply: DTensor and other subclasses, sparse, complex and meta
tensors, `torch.func`, forward-mode, `torch.jit.trace` and `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

Strength: TypeAlias = float | Tensor
Entry: TypeAlias = tuple[Tensor, Strength, Strength]
Group: TypeAlias = tuple[list[Tensor], Strength, Strength]

# AccumulateGrad takes or frees a bucket's gradients before the next bucket's are made, so a bucket
# bounds the extra memory: 4 MB, which also stay in the cache from one pass to the next. 8 MB made
# L1 on two threads twice as slow; one bucket over everything takes 2 to 5 times the loop's memory.
_BUCKET_ELEMENTS = 1 << 20
_BUCKET_TENSORS = 128
# Fewer where that would show: the loop's own peak is weights, gradients and two temporaries of the
# largest tensor. A bucket of that size, and a 16th of the weights, stays within 3 % of it.
_BUCKET_SHARE = 16
_BUCKET_LEAST = 1 << 17
# Small tensors: 30,000 elements stay below the 32,768 from which torch's kernels use all threads.
# On busy cores to wake one up costs more than the sum.
_SMALL = 1 << 12
_SMALL_BUCKET_ELEMENTS = 30_000
# From here on a tensor is worth operations of its own.
_LARGE = 1 << 18
_ROW = 256

_TYPES = (Tensor, nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which a sum over `dtype` is right: float32, or wider."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def real(w: Tensor) -> Tensor:
    """`w` as a real tensor, float32 or wider: cast before anything is squared (fp16 overflows)."""
    if w.is_complex():
        w = torch.view_as_real(w)
    return w.to(accumulator(w.dtype))


def plain_l1(w: Tensor) -> Tensor:
    """sum(abs(w)), differentiable in every way that PyTorch knows."""
    return w.abs().sum(dtype=accumulator(w.dtype))


def plain_l2(w: Tensor) -> Tensor:
    """sum(abs(w)^2), differentiable likewise."""
    # Not a norm: on a CPU torch.linalg.vector_norm over a whole tensor adds up naively in float32
    # (37 % off at 1e8 elements); sum() cascades.
    return real(w).square().sum()


def applies(w: Tensor) -> bool:
    """Whether `w` is a plain dense real tensor on a CPU or a CUDA device."""
    return (
        type(w) in _TYPES
        and w.layout is torch.strided
        and w.dtype in _DTYPES
        and w.device.type in ("cpu", "cuda")
    )


def penalty_sum(
    tensors: Sequence[Tensor], l1: Sequence[Strength], l2: Sequence[Strength]
) -> Tensor:
    """sum_i l1_i * sum(abs(w_i)) + l2_i / 2 * sum(w_i^2); gradient l1_i * sign(w_i) + l2_i * w_i.

    A tensor whose strength is the number 0 is not read: it adds nothing even if it is infinite. A
    strength may be a 0-dim tensor, which is differentiable too. Tensors are computed together if
    they are alike and share their strengths (equal numbers, or the very same tensor).

    Args:
        tensors: weights of any shapes, layouts, dtypes and devices.
        l1: a strength for each.
        l2: a strength for each.

    Returns:
        A 0-dim tensor on the device of the first weight; float32, or float64 if a weight is.
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    wide = torch.float64 in {accumulator(w.dtype) for w in tensors}
    dtype = torch.float64 if wide else torch.float32
    entries = zip(tensors, l1, l2, strict=True)
    terms = [t.to(device, dtype) for t in (_fast(entries) if _eager() else _plain(entries))]
    return _total(terms) if terms else torch.zeros((), dtype=dtype, device=device)


def _eager() -> bool:
    """Whether operations run as they are written: nothing compiles, traces or transforms them."""
    return not (
        torch.compiler.is_compiling()  # a compiler fuses the plain sums just as well
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _plain_backward(g: Tensor) -> bool:
    """Whether it is not differentiated again (`create_graph`) nor batched (`is_grads_batched`)."""
    # The batch of is_grads_batched can only be told by its lack of a storage.
    return not torch.is_grad_enabled() and _eager() and torch._C._has_storage(g)


def _acts(strength: Strength) -> bool:
    return isinstance(strength, Tensor) or strength != 0


def _total(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(tuple(values)).sum()


def _plain(entries: Iterable[Entry]) -> Iterator[Tensor]:
    for w, a, b in entries:
        if _acts(a):
            yield a * plain_l1(w)
        if _acts(b):
            yield b / 2 * plain_l2(w)


def _fast(entries: Iterable[Entry]) -> Iterator[Tensor]:
    for ws, a, b in _groups(entries):
        alone = len(ws) == 1 and ws[0].numel() < _LARGE  # a Function costs more than it saves
        if alone or not applies(ws[0]):
            yield from _plain((w, a, b) for w in ws)
        else:
            yield from _bucketed(ws, a, b)


def _groups(entries: Iterable[Entry]) -> Iterable[Group]:
    """What may share a bucket: tensors alike in all that `applies` asks, with equal strengths."""
    groups: dict[tuple[object, ...], Group] = {}
    for w, a, b in entries:
        key = (
            *(type(w), w.layout, w.dtype, w.device, w.requires_grad),
            id(a) if isinstance(a, Tensor) else a,
            id(b) if isinstance(b, Tensor) else b,
        )
        if key in groups:
            groups[key][0].append(w)
        else:
            groups[key] = ([w], a, b)
    return groups.values()


def _bucketed(ws: list[Tensor], a: Strength, b: Strength) -> Iterator[Tensor]:
    buckets = list(_buckets(ws))
    size = min(max(elements for elements, _ in buckets), _BUCKET_ELEMENTS)
    # One buffer for all: a temporary for each would come back as cold or as fresh memory, and to
    # touch a fresh page costs 20 times what reading and writing it does.
    buffer = torch.empty(size, dtype=accumulator(ws[0].dtype), device=ws[0].device)
    l1, l2 = [], []
    for elements, bucket in buckets:  # L1 beside L2: their gradients meet before the next bucket's
        if _acts(a):
            l1.append(_sum_of_abs(buffer[:elements], *bucket))
        if _acts(b):
            l2.append(_half_sum_of_squares(buffer[:elements], *bucket))
    if l1:
        yield a * _total(l1)
    if l2:
        yield b * _total(l2)


def _buckets(ws: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """`ws` by ascending size in runs that respect the limits above, with their elements."""
    ws = sorted(ws, key=Tensor.numel)
    share = sum(w.numel() for w in ws) // _BUCKET_SHARE + 2 * ws[-1].numel()
    most = min(max(share, _BUCKET_LEAST), _BUCKET_ELEMENTS)
    bucket: list[Tensor] = []
    elements = 0
    for w in ws:
        n = w.numel()
        limit = _SMALL_BUCKET_ELEMENTS if n <= _SMALL else most
        if bucket and (elements + n > limit or len(bucket) == _BUCKET_TENSORS):
            yield elements, bucket
            bucket, elements = [], 0
        bucket.append(w)
        elements += n
    yield elements, bucket


# Both Functions are written in the short form, without setup_context and a vmap rule: wherever
# those would be asked for, `_eager` has sent the caller to the plain sums (and spared each bucket
# the 10 us that the long form spends on binding its arguments).


class _L1(Function):
    """The sum of the absolute values of a bucket."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, *ws: Tensor) -> Tensor:
        ctx.save_for_backward(*ws)
        if ws[-1].numel() < _LARGE:
            return torch.cat([_flat(w) for w in ws], out=buffer).abs_().sum()
        pieces = [piece for w in ws for piece in torch.split(_flat(w), len(buffer))]
        return _total([torch.abs(p.to(buffer.dtype), out=buffer[: len(p)]).sum() for p in pieces])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ws = ctx.saved_tensors
        if not _plain_backward(g):
            return (None, *(w.sign() * g for w in ws))
        grads = torch._foreach_sign(ws)
        torch._foreach_mul_(grads, g)
        return (None, *grads)


class _L2(Function):
    """Half the sum of the squares of a bucket."""

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, *ws: Tensor) -> Tensor:
        ctx.save_for_backward(*ws)
        if ws[-1].numel() < _LARGE:
            roots = torch.cat([_flat(w) for w in ws], out=buffer)
        else:
            roots = torch.cat([root for w in ws for root in _roots(w)])
        return roots.square_().sum().div_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        ws = ctx.saved_tensors
        if not _plain_backward(g):
            return (None, *(w * g for w in ws))
        return (None, *torch._foreach_mul(ws, g))


_sum_of_abs: Callable[..., Tensor] = _L1.apply  # torch leaves `apply` untyped
_half_sum_of_squares: Callable[..., Tensor] = _L2.apply


def _roots(w: Tensor) -> tuple[Tensor, Tensor]:
    """Two vectors with the sum of squares of `w`: norms of its rows, and the elements left over.

    `vector_norm` takes one pass and no temporary, but adds up naively. Of equal weights the squares
    come out wrong by 6e-6 in rows of 4,608, by 4e-7 in rows of 256, at the same speed.
    """
    flat = _flat(w)
    cut = len(flat) - len(flat) % _ROW
    dtype = accumulator(w.dtype)
    norms = torch.linalg.vector_norm(flat[:cut].view(-1, _ROW), 2, dim=1, dtype=dtype)
    return norms, flat[cut:].to(dtype)


def _flat(w: Tensor) -> Tensor:
    """The elements of `w` in the order of the memory: a view of any dense tensor, or a copy."""
    if w.dim() == 1:
        return w
    if not w.is_contiguous():  # channels_last, transposed, ...
        w = w.permute(sorted(range(w.dim()), key=w.stride, reverse=True))
    return w.reshape(-1)
