"""Distributed parameters as plain tensors: the shard alone where that is enough, else the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor

from regwrap.proximal import Metric
from regwrap.terms import GroupLasso, MaxNorm, Term

Act = Callable[[Sequence[Tensor], Metric], None]


def is_distributed(w: Tensor) -> bool:
    """Whether the tensor is a `DTensor`, asked without importing one."""
    return hasattr(w, "placements")


def run(act: Act, term: Term, ws: Sequence[Tensor], metric: Metric) -> None:
    """`act(ws, metric)`, in place, on plain tensors."""
    if not any(is_distributed(w) for w in ws):
        act(ws, metric)
        return
    for i, w in enumerate(ws):
        moments = None if metric.moments is None else [metric.moments[i]]
        alone = dataclasses.replace(metric, moments=moments)
        _run_one(act, w, alone, shard_is_enough(term, w))


def _run_one(act: Act, w: Tensor, metric: Metric, on_shard: bool) -> None:
    seen = local if on_shard else whole
    moments = None if metric.moments is None else [seen(m) for m in metric.moments]
    plain = seen(w)
    if plain.numel():  # with more ranks than rows, a rank has an empty shard
        act([plain], dataclasses.replace(metric, moments=moments))
    if not on_shard:
        local(w).copy_(_part(plain, w))


def shard_is_enough(term: Term, w: Tensor) -> bool:
    """Whether no group of the term goes over several shards."""
    if not isinstance(term, GroupLasso | MaxNorm):
        return True
    if isinstance(term, GroupLasso) and term.size > 1:
        return False
    placements = getattr(w, "placements", ())
    return all(p.is_replicate() or p.is_shard(term.dim % w.dim()) for p in placements)


def local(w: Tensor) -> Tensor:
    """The part that lies on this rank, itself and no copy."""
    return w.to_local() if is_distributed(w) else w  # type: ignore[attr-defined]


def whole(w: Tensor) -> Tensor:
    """All of it, gathered from the ranks."""
    return w.full_tensor() if is_distributed(w) else w  # type: ignore[attr-defined]


def _part(full: Tensor, w: Tensor) -> Tensor:
    """What of a tensor that every rank holds in full lies on this rank."""
    if not is_distributed(w):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    mesh = w.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=w.placements).to_local()  # type: ignore[attr-defined]
