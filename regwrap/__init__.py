"""Regularize a PyTorch model that exists already, see what acts where, and take it all back."""

from regwrap.api import plan, policy, regularize, summary, unregularize
from regwrap.config import load_rules, rules_from_dicts, rules_to_dicts, save_rules
from regwrap.decorator import regularized
from regwrap.errors import PolicyError, RegwrapError, RegwrapWarning, UnmatchedRule
from regwrap.findings import Finding, doctor
from regwrap.optimizers import param_groups
from regwrap.penalty import penalties, reg_loss
from regwrap.record import Entry, Policy
from regwrap.terms import (
    L1,
    L2,
    L2SP,
    DropConnect,
    Dropout,
    ElasticNet,
    GroupLasso,
    Orthogonal,
    Penalty,
    WeightDecay,
)
from regwrap.trust import Check, Report, verify
from regwrap.uncertainty import MCPrediction, mc_dropout, mc_predict
from regwrap.where import Where

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "L2SP",
    "Check",
    "DropConnect",
    "Dropout",
    "ElasticNet",
    "Entry",
    "Finding",
    "GroupLasso",
    "MCPrediction",
    "Orthogonal",
    "Penalty",
    "Policy",
    "PolicyError",
    "RegwrapError",
    "RegwrapWarning",
    "Report",
    "UnmatchedRule",
    "WeightDecay",
    "Where",
    "doctor",
    "load_rules",
    "mc_dropout",
    "mc_predict",
    "param_groups",
    "penalties",
    "plan",
    "policy",
    "reg_loss",
    "regularize",
    "regularized",
    "rules_from_dicts",
    "rules_to_dicts",
    "save_rules",
    "summary",
    "unregularize",
    "verify",
]
