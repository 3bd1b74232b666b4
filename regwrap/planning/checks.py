"""Refuses what no mechanism can carry, before anything is touched."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from regwrap import sites
from regwrap.errors import PolicyError
from regwrap.planning.claims import Claim, Claims
from regwrap.planning.survey import Key, Survey, class_name
from regwrap.record import Rule
from regwrap.terms import L1, L2SP, DropConnect, Dropout, GroupLasso, MaxNorm, Orthogonal
from regwrap.where import shown


def check(survey: Survey, claims: Claims) -> None:
    """Refuses what no mechanism can carry, before anything is touched."""
    inside = _compiled_inside(survey)
    for key, families in claims.held.items():
        for claim in families.values():
            module, name = claim.owners[0]
            path = _path_of(survey, key, claim)
            if isinstance(module, torch.jit.ScriptModule):
                raise PolicyError(
                    _refusal(claim, path, "is a ScriptModule", "regularize before scripting")
                )
            drops = isinstance(claim.term, Dropout) and claim.mechanism is not None
            if drops and id(module) in inside:
                raise PolicyError(
                    _refusal(claim, path, "is inside a compiled submodule", "compile afterwards")
                )
            if drops and any(p.is_complex() for p in module.parameters()):
                why = "has complex weights, for which torch has no dropout"
                raise PolicyError(_refusal(claim, path, why, "penalise it instead"))
            if claim.mechanism == "parametrization":
                _check_parametrizable(survey, key, claim, path)
            if isinstance(claim.term, GroupLasso | Orthogonal | MaxNorm):
                _check_shape(claim, claim.term, path, sites.shape(module, name))
    _check_sharded(survey, claims)


def _check_sharded(survey: Survey, claims: Claims) -> None:
    """Under fully_shard no parameter may move: FSDP2 keeps it by its module and name."""
    inside = sites.sharded(survey.model)
    wanted: dict[int, set[tuple[str, bool]]] = {}
    for families in claims.held.values():
        for claim in families.values():
            if claim.mechanism == "parametrization":
                for module, name in claim.owners:
                    is_mask = isinstance(claim.term, DropConnect)
                    wanted.setdefault(id(module), set()).add((name, is_mask))
    for node in survey.firsts():
        held = id(node.module)
        if held in inside and sites.changed(node.module) != wanted.get(held, set()):
            raise PolicyError(
                f"DropConnect and L1(..., solver='hadamard') cannot be put on or taken from "
                f"{node.path!r} ({class_name(node.module)}), which fully_shard has sharded; "
                "regularize the model before fully_shard."
            )


def _check_parametrizable(survey: Survey, key: Key, claim: Claim, path: str) -> None:
    module, name = claim.owners[0]
    stored = sites.stored(module, name)
    if sites.is_effective(module, name) and name not in sites.parametrized(module):
        why = "is computed in a hook by the old weight_norm, spectral_norm or prune"
        way = "use torch.nn.utils.parametrizations, or make it permanent, first"
    elif isinstance(module, nn.RNNBase):
        why, way = f"{class_name(module)} keeps in a list of its own", "penalise it by L1 or L2"
    elif any(sites.is_lazy(t) for t in stored):
        why, way = "is lazy", "regularize after the first forward"
    elif isinstance(claim.term, L1) and len(survey.sites[key].paths) > 1:
        why, way = "is shared under several names", "use L1 without solver="
    elif isinstance(claim.term, L1) and sites.computed_from_several(module, name):
        why, way = "is parametrized by several tensors", "use L1 without solver="
    else:
        return
    raise PolicyError(_refusal(claim, path, why, way))


def _refusal(claim: Claim, path: str, why: str, way_out: str) -> str:
    return (
        f"Rule ({shown(claim.rule.where)!r}: {claim.term!r}) cannot act on {path!r}, which {why}; "
        f"{way_out}, or leave it out with {{{path!r}: None}}."
    )


def _compiled_inside(survey: Survey) -> set[int]:
    """Modules beneath a `torch.compile` wrapper that is a submodule."""
    inside: list[bool] = []
    for node in survey.tree:
        above = node.parent is not None and inside[node.parent]
        inside.append(above or sites.is_compiled(node.module))
    return {id(n.module) for n, hit in zip(survey.tree, inside, strict=True) if hit}


def _path_of(survey: Survey, key: Key, claim: Claim) -> str:
    if key in survey.sites:
        return survey.sites[key].paths[0]
    return survey.names[id(claim.owners[0][0])][0]


def _check_shape(
    claim: Claim, term: GroupLasso | Orthogonal | MaxNorm, path: str, shape: tuple[int, ...] | None
) -> None:
    if shape is None:
        return
    if isinstance(term, Orthogonal):
        if len(shape) < 2:
            why = f"has shape {shape} and no rows"
            raise PolicyError(_refusal(claim, path, why, "name a weight of 2 dimensions"))
        return
    if not -len(shape) <= term.dim < len(shape):
        why = f"has shape {shape} and no dim {term.dim}"
        raise PolicyError(_refusal(claim, path, why, "give a dim that it has"))
    if isinstance(term, GroupLasso) and shape[term.dim] % term.size:
        why = f"has {shape[term.dim]} units along dim {term.dim}, no multiple of {term.size}"
        raise PolicyError(_refusal(claim, path, why, "give a size that divides them"))


def start_of(survey: Survey, claim: Claim, key: Key) -> Tensor:
    """The tensor that an L2SP pulls its site toward, on the owner's device.

    Raises:
        PolicyError: where there is none, or one of another shape.
    """
    assert isinstance(claim.term, L2SP)
    module, name = claim.owners[0]
    paths = survey.sites[key].paths
    live = sites.look(module, name)
    if claim.term.reference is None:
        if live is None:
            raise PolicyError(_refusal(claim, paths[0], "is lazy and has no values yet", _GIVE))
        if live is not None and live.is_meta:
            raise PolicyError(
                _refusal(claim, paths[0], "is on the meta device and has no values", _GIVE)
            )
        return live
    found = _look_up(claim.term.reference, paths)
    if found is None:
        raise PolicyError(_refusal(claim, paths[0], "is not in the reference", _GIVE))
    if not isinstance(found, Tensor) or found.is_meta:
        what = "a meta tensor" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise PolicyError(_refusal(claim, paths[0], f"is {what} in the reference", _GIVE))
    if live is not None and found.shape != live.shape:
        why = f"has shape {tuple(live.shape)}, its reference {tuple(found.shape)}"
        raise PolicyError(_refusal(claim, paths[0], why, _GIVE))
    return found


_GIVE = "give reference= a state_dict or a model that has it"


def _look_up(reference: Mapping[str, Tensor] | nn.Module, paths: Iterable[str]) -> Tensor | None:
    if isinstance(reference, Mapping):
        return next((reference[p] for p in paths if p in reference), None)
    inner = sites.unwrap(reference)
    for path in paths:
        owner, _, name = path.rpartition(".")
        try:
            found = sites.look(inner.get_submodule(owner), name)
        except AttributeError:
            continue
        if found is not None:
            return found
    return None


def l2sp(claims: Claims, added: Container[Rule]) -> Iterator[tuple[Key, Claim]]:
    """The claims of these rules that need a starting point; those of earlier calls have one."""
    return (
        (key, claim)
        for key, families in claims.held.items()
        for claim in families.values()
        if isinstance(claim.term, L2SP) and claim.rule in added
    )
