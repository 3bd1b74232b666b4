"""Regularize a PyTorch model that exists already, see what acts where, and take it all back."""

from regwrap import recipes as recipes  # regwrap.recipes.vit(), without an import of its own
from regwrap.api import plan, policy, regularize, summary, unregularize
from regwrap.config import load_rules, rules_from_dicts, rules_to_dicts, save_rules
from regwrap.decorator import regularized
from regwrap.errors import PolicyError, RegwrapError, RegwrapWarning, UnmatchedRule
from regwrap.findings import Finding, doctor
from regwrap.optimizers import Attachment, attach, param_groups, sparsity
from regwrap.penalty import penalties, reg_loss
from regwrap.record import Entry, Policy
from regwrap.schedule import StrengthScheduler
from regwrap.terms import (
    L1,
    L2,
    L2SP,
    DropConnect,
    Dropout,
    ElasticNet,
    GroupLasso,
    MaxNorm,
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
    "Attachment",
    "Check",
    "DropConnect",
    "Dropout",
    "ElasticNet",
    "Entry",
    "Finding",
    "GroupLasso",
    "MCPrediction",
    "MaxNorm",
    "Orthogonal",
    "Penalty",
    "Policy",
    "PolicyError",
    "RegwrapError",
    "RegwrapWarning",
    "Report",
    "StrengthScheduler",
    "UnmatchedRule",
    "WeightDecay",
    "Where",
    "attach",
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
    "sparsity",
    "summary",
    "unregularize",
    "verify",
]
