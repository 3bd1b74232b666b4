"""Refuses what no mechanism can carry, before anything is touched."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from regwrap import sites
from regwrap.errors import PolicyError
from regwrap.planning.claims import Claim, Claims
from regwrap.planning.survey import Key, Survey
from regwrap.record import Rule
from regwrap.terms import L2SP, Dropout, GroupLasso, MaxNorm, Orthogonal
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
            if isinstance(claim.term, GroupLasso | Orthogonal | MaxNorm):
                _check_shape(claim, claim.term, path, sites.shape(module, name))


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
