"""Where a Dropout acts: in the owner's code, by a hook, or as a rate that is there already."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from regwrap import graph, record, sites
from regwrap.errors import PolicyError, RegwrapWarning
from regwrap.graph import joined
from regwrap.planning.claims import Claim, Claims
from regwrap.planning.reach import Reach
from regwrap.planning.survey import CALL, Survey, class_name
from regwrap.record import Rule
from regwrap.terms import Dropout
from regwrap.where import shown


@dataclass(frozen=True, eq=False)
class Place:
    """What a Dropout rule acts on, and by which mechanism; None where nothing acts."""

    module: nn.Module
    mechanism: str | None
    note: str = ""
    callers: int = 0
    """By fx: how many modules get it into their code."""


def claim_calls(survey: Survey, claims: Claims, rule: Rule, reach: Reach) -> int:
    """Gives a Dropout the layers it reaches and the rates it names; returns how many."""
    assert isinstance(rule.term, Dropout)
    _refuse_kind(rule, rule.term)
    layers = _layers(survey, reach)
    rates = list(_rates_named(reach))
    _refuse_idle(survey, rule, layers if not rates else [])
    for module in layers:
        _take(survey, claims, rule, module, _place(survey, rule, module))
    for module in rates:
        _take(survey, claims, rule, module, Place(module, "direct", _rate_note(module)))
    return len(layers) + len(rates)


def release(survey: Survey, claims: Claims, rule: Rule, module: nn.Module) -> None:
    """Clears what acts for a layer, wherever it lies."""
    _refuse_owner_above(survey, rule, module)
    claims.clear((CALL, id(module)), rule)
    for elsewhere in _elsewhere(survey, claims, module):
        claims.clear((CALL, id(elsewhere)), rule)


def _take(survey: Survey, claims: Claims, rule: Rule, layer: nn.Module, place: Place) -> None:
    for acting in (layer, *_elsewhere(survey, claims, layer)):
        if acting is not place.module:  # an earlier rule put it there
            claims.displace((CALL, id(acting)), _FAMILY, rule)
    assert rule.term is not None
    owners = ((place.module, CALL),)
    acts = (place.mechanism, owners)
    claim = Claim(CALL, rule.term, rule, *acts, note=place.note, callers=place.callers)
    claims.take((CALL, id(place.module)), claim)


_FAMILY = ("Dropout",)


def _elsewhere(survey: Survey, claims: Claims, layer: nn.Module) -> list[nn.Module]:
    """The modules on which a Dropout of this layer lies, and not one of their own."""
    others = (_existing(survey, layer), _activation_module(survey, layer))
    found = {id(m): m for m in others if m is not None}
    held = {i: claims.held.get((CALL, i), {}).get(_FAMILY) for i in found}
    return [found[i] for i, c in held.items() if c is not None and _serves(c, survey, layer)]


def _serves(claim: Claim, survey: Survey, layer: nn.Module) -> bool:
    """Whether the claim was made for the layer, whose path may have grown since."""
    told = claim.note.partition(":")[0]
    paths = (f".{path}" for path in survey.names[id(layer)])
    return told.startswith(_FOR) and any(p.endswith(f".{told[len(_FOR) :]}") for p in paths)


_FOR = "for "


def _place_for(survey: Survey, layer: nn.Module, module: nn.Module, how: str, note: str) -> Place:
    """A place on another module than the layer; the note says which layer it serves."""
    return Place(module, how, f"{_FOR}{_path(survey, layer)}: {note}")


# --- which layers -------------------------------------------------------------------------------


def _layers(survey: Survey, reach: Reach) -> list[nn.Module]:
    """Every Linear reached, and other leaf layers that the rule names itself."""
    governed = {id(m) for n in _itself(reach) for m in _governed(n)}
    found = {
        id(n.module): n.module
        for n in reach.modules
        if graph.is_linear(n.module) and id(n.module) not in governed
    }
    for module in _itself(reach):
        leaf = not sites.children(module) and survey.is_called(module)
        if leaf and rate_of(module) is None and not sites.is_norm(module):
            found.setdefault(id(module), module)
    return list(found.values())


def _itself(reach: Reach) -> list[nn.Module]:
    if not reach.where.names_layer():
        return []
    return list({id(node.module): node.module for node in reach.named}.values())


_ENCODERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _governed(module: nn.Module) -> tuple[nn.Module, ...]:
    """The Linears of a stock transformer layer, whose own dropouts follow them."""
    return (module.linear1, module.linear2) if isinstance(module, _ENCODERS) else ()


def _rates_named(reach: Reach) -> Iterator[nn.Module]:
    """Modules with a dropout rate of their own that the rule names itself."""
    for module in _itself(reach):
        if rate_of(module) is not None:
            yield module
        if isinstance(module, _ENCODERS):
            yield from (m for m in module.children() if rate_of(m) is not None)


_ATTRIBUTES = ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "drop_prob")


def rate_of(module: nn.Module) -> str | None:
    """The attribute in which a module keeps a dropout rate of its own, None without one."""
    names = ("p", *_ATTRIBUTES) if graph.is_dropout(module) else _ATTRIBUTES
    held = vars(module)
    return next((n for n in names if isinstance(held.get(n), float)), None) or next(
        (n for n in names if graph.is_dropout(module) and type(held.get(n)) is int), None
    )


def _rate_note(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return f"without effect: a {class_name(module)} drops between its layers, and has one"
    return ""


def _refuse_kind(rule: Rule, term: Dropout) -> None:
    """Refuses a class that is not built from a rate, or has what the checkpoint would show."""
    if issubclass(term.kind, _DropoutNd):
        return
    told = f"Rule ({shown(rule.where)!r}: {rule.term!r}) has a kind"
    try:
        with torch.random.fork_rng(devices=[]):
            state = term.kind(term.p).state_dict()
    except Exception as error:  # whatever the user's class raises
        raise PolicyError(
            f"{told} that cannot be built from a rate alone ({type(error).__name__}); name a class "
            "whose one argument is the rate."
        ) from error
    if state:
        raise PolicyError(
            f"{told} with a state of its own ({', '.join(state)}), which the checkpoint would "
            "show; name a class without parameters and buffers."
        )


def _refuse_idle(survey: Survey, rule: Rule, layers: list[nn.Module]) -> None:
    if layers and all(_is_idle(survey, module) for module in layers):
        raise PolicyError(
            f"Rule ({shown(rule.where)!r}: {rule.term!r}) reaches only Linear layers that are "
            f"never called in {class_name(survey.model)} (at most a function uses their weights), "
            "so that a Dropout after them would never act; name another layer."
        )


def _is_idle(survey: Survey, module: nn.Module) -> bool:
    """Whether the model has code, all of it is known, and none of it calls the layer."""
    verdict = survey.verdict(module)
    unseen = verdict is not None and verdict.never_called and _has_body_above(survey, module)
    return id(module) in survey.idle or unseen


def _has_body_above(survey: Survey, module: nn.Module) -> bool:
    """Whether any module that holds this one has a forward: a ModuleDict's parts run elsewhere."""
    above = {p.rpartition(".")[0] for p in survey.names[id(module)] if p}
    while above:
        if any(survey.is_called(survey.model.get_submodule(path)) for path in above):
            return True
        above = {p.rpartition(".")[0] for p in above if p}
    return False


# --- where it acts ------------------------------------------------------------------------------


def _place(survey: Survey, rule: Rule, layer: nn.Module) -> Place:
    term = rule.term
    assert isinstance(term, Dropout)
    _refuse_owner_above(survey, rule, layer)
    if _is_idle(survey, layer):
        uses = "a function uses its weight" if id(layer) in survey.idle else "no code calls it"
        return Place(layer, None, f"never called: {uses}")
    if term.at == "activation":
        return _behind_activation(survey, rule, layer)
    if term.p == 0:
        return Place(layer, None, "rate 0: installs nothing")
    replaced = _replaced(survey, layer, term) if term.at == "output" else None
    return replaced or _by_fx_or_hook(survey, layer, term)


def _refuse_owner_above(survey: Survey, rule: Rule, layer: nn.Module) -> None:
    callers = max((m.callers for m in record.read(layer).marks if m.mechanism == "fx"), default=0)
    verdict = survey.verdict(layer)
    seen = 0 if verdict is None else len(verdict.sites)
    # of the model that was regularized itself a caller may have been replaced since
    if seen < callers and (seen == 0 or record.read(survey.model).census is None):
        raise PolicyError(
            f"Rule ({shown(rule.where)!r}: {rule.term!r}) reaches {_path(survey, layer)!r}, whose "
            "Dropout is in the code of a module above or beside the one given; call regularize on "
            "the model that was regularized first."
        )


def _against_fx(survey: Survey, layer: nn.Module, term: Dropout) -> str:
    """Why the owners' code is not written anew, in words; `""` if it is."""
    verdict = survey.verdict(layer)
    if verdict is None:
        return "the layer is the model itself"
    if not verdict.by_fx:
        return verdict.reason or "no code of the model calls it"
    if not _surely_gives_tensor(type(layer)):
        return f"the forward of {class_name(layer)} is its author's own"
    if term.at == "input" and not all(c.one_input for site in verdict.sites for c in site.calls):
        return "its input is not written alone where it is called"
    owners = (survey.model, *(survey.model.get_submodule(site.owner) for site in verdict.sites))
    copying = [class_name(module) for module in owners if _copies_itself(module)]
    return f"{copying[0]} copies or pickles itself in its own way" if copying else ""


def _surely_gives_tensor(cls: type[nn.Module]) -> bool:
    """Whether a layer's forward is known to give a tensor: a router gives a tuple."""
    home, given = cls.forward.__module__, cls.forward.__annotations__.get("return")
    known = home.startswith(("torch.", "transformers.pytorch_utils"))
    return known or (home.startswith("transformers.") and given is torch.Tensor)


_COPYING = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")


def _copies_itself(module: nn.Module) -> bool:
    """Whether the author's class copies or pickles in its own way, which may lose new children."""
    authored = (
        c for c in type(module).__mro__ if not c.__module__.startswith(("regwrap", "torch"))
    )
    return any(name in vars(c) for c in authored for name in _COPYING if c is not object)


def _by_fx_or_hook(survey: Survey, layer: nn.Module, term: Dropout) -> Place:
    verdict, why = survey.verdict(layer), _against_fx(survey, layer, term)
    notes = [f"not by fx: {why}"] if why else []
    if term.at != "input" and verdict is not None and _stacks(survey, verdict, term):
        notes.append("stacked on a Dropout that follows")
    callers = 0 if why or verdict is None else len(verdict.sites)
    return Place(layer, "hook" if why else "fx", "; ".join(notes), callers)


def _behind_activation(survey: Survey, rule: Rule, layer: nn.Module) -> Place:
    verdict = survey.verdict(layer)
    calls = [] if verdict is None else [c for site in verdict.sites for c in site.calls]
    found = [c.activation for c in calls]
    if not found or any(a is None for a in found):
        raise PolicyError(_no_activation(survey, rule, layer, calls))
    assert isinstance(rule.term, Dropout)
    if rule.term.p == 0:
        return Place(layer, None, "rate 0: installs nothing")
    replaced = _replaced(survey, layer, rule.term)
    against = _against_fx(survey, layer, rule.term)
    if replaced is not None or not against:
        return replaced or _by_fx_or_hook(survey, layer, rule.term)
    why = f"not by fx: {against}"
    module = _activation_module(survey, layer)
    if module is not None:
        return _place_for(survey, layer, module, "hook", f"behind its activation; {why}")
    if all(a is not None and a.commutes for a in found):
        return Place(layer, "hook", f"before the activation, which is the same; {why}")
    raise PolicyError(_no_activation(survey, rule, layer, calls))


def _no_activation(survey: Survey, rule: Rule, layer: nn.Module, calls: list[graph.Call]) -> str:
    follower = next((c.follower for c in calls if c.activation is None), "")
    if follower:
        why = f"no elementwise activation follows it, but {follower}"
    elif calls:
        why = "the code that calls it cannot be rewritten, and no module serves it alone"
    else:
        why = "the code that calls it cannot be read"
    return (
        f"Rule ({shown(rule.where)!r}: {rule.term!r}) finds no place behind the activation of "
        f"{_path(survey, layer)!r}: {why}; write at='output'."
    )


def _replaced(survey: Survey, layer: nn.Module, term: Dropout) -> Place | None:
    """The model's own dropout that is given the rate, in place of a second one behind it."""
    existing = _existing(survey, layer)
    if existing is None or not _is_alike(existing, term) or rate_of(existing) is None:
        return None
    if _would_overwrite(existing, _calls(survey, layer)):
        return None
    return _place_for(survey, layer, existing, "direct", "replaces a Dropout's rate")


def _would_overwrite(existing: nn.Module, calls: list[graph.Call]) -> bool:
    """Whether a dropout that was off would drop in place what the activation before it saved."""
    behind = any(c.dropout is not None and c.dropout.behind for c in calls)
    return behind and bool(getattr(existing, "inplace", False)) and vars(existing).get("p") == 0


def _is_alike(existing: nn.Module, term: Dropout) -> bool:
    """Whether the dropout drops what the term's would: a DropPath drops whole samples."""
    drops_elements = type(existing).__name__.lower().endswith("dropout")
    stock = isinstance(existing, _DropoutNd)
    return type(existing) is term.kind or (term.kind is nn.Dropout and (drops_elements or stock))


def _existing(survey: Survey, layer: nn.Module) -> nn.Module | None:
    """The model's own dropout that follows every call of the layer and serves it alone."""
    calls = _calls(survey, layer)
    return _alone(survey, layer, [c.dropout.module if c.dropout else None for c in calls])


def _activation_module(survey: Survey, layer: nn.Module) -> nn.Module | None:
    """The activation module that follows every call of the layer and serves it alone."""
    calls = _calls(survey, layer)
    return _alone(survey, layer, [c.activation.module if c.activation else None for c in calls])


def _calls(survey: Survey, layer: nn.Module) -> list[graph.Call]:
    verdict = survey.verdict(layer)
    if verdict is None or verdict.reason not in ("", _SEQUENTIAL):
        return []
    return [call for site in verdict.sites for call in site.calls]


_SEQUENTIAL = "the owner is a stock nn.Sequential"


def _alone(survey: Survey, layer: nn.Module, names: list[str | None]) -> nn.Module | None:
    """The child of the layer's only owner by this name, if nothing else calls it."""
    verdict = survey.verdict(layer)
    if verdict is None or len(verdict.sites) != 1 or len(names) != 1 or names[0] is None:
        return None
    module = survey.model.get_submodule(joined(verdict.sites[0].owner, names[0]))
    others = survey.verdict(module)
    once = others is not None and sum(len(site.calls) for site in others.sites) == 1
    readable = others is not None and others.reason in ("", _SEQUENTIAL)
    return module if once and readable else None


def _stacks(survey: Survey, verdict: graph.Verdict, term: Dropout) -> bool:
    """Whether a Dropout follows that could not be taken in place of another."""
    found = [(site, c.dropout) for site in verdict.sites for c in site.calls if c.dropout]
    names = [joined(site.owner, dropout.module) for site, dropout in found if dropout.module]
    alike = [_is_alike(survey.model.get_submodule(name), term) for name in names]
    return any(alike) or len(names) < len(found)  # the others are functions


def _path(survey: Survey, module: nn.Module) -> str:
    return survey.names[id(module)][0] or "the model itself"


# --- the model's output -------------------------------------------------------------------------


def warn_of_outputs(survey: Survey, claims: Claims, reaches: Mapping[Rule, Reach]) -> None:
    """Says so where a Dropout came behind the model's output by a rule that did not name it."""
    for rule, reach in reaches.items():
        named = {id(module) for module in _itself(reach)}
        for layer in _dropped_by(claims, rule):
            if id(layer) not in named and survey.is_output(layer):
                warnings.warn(
                    f"Rule ({shown(rule.where)!r}: {rule.term!r}) puts a Dropout behind "
                    f"{_path(survey, layer)!r}, whose output is the model's: predictions are "
                    "dropped; write at='input' for it, or clear it with None.",
                    RegwrapWarning,
                    stacklevel=4,
                )


def _dropped_by(claims: Claims, rule: Rule) -> Iterator[nn.Module]:
    """The modules behind which the rule put a Dropout that no later rule took away."""
    if not isinstance(rule.term, Dropout) or rule.term.at == "input":
        return
    for key, families in claims.held.items():
        claim = families.get(_FAMILY) if key[0] == CALL else None
        if claim is not None and claim.rule == rule and claim.mechanism in ("fx", "hook"):
            yield claim.owners[0][0]
