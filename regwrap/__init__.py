"""Regularize a PyTorch model that exists already, see what acts where, and take it all back."""

from regwrap.api import plan, policy, regularize, summary, unregularize
from regwrap.decorator import regularized
from regwrap.errors import PolicyError, RegwrapError, RegwrapWarning, UnmatchedRule
from regwrap.optimizers import Attachment, attach, param_groups, sparsity
from regwrap.penalty import penalties, reg_loss
from regwrap.record import Entry, Policy
from regwrap.schedule import StrengthScheduler
from regwrap.terms import (
    L1,
    L2,
    L2SP,
    Dropout,
    ElasticNet,
    GroupLasso,
    MaxNorm,
    Orthogonal,
    Penalty,
    WeightDecay,
)
from regwrap.where import Where

__version__ = "0.1.0"

__all__ = [
    "L1",
    "L2",
    "L2SP",
    "Attachment",
    "Dropout",
    "ElasticNet",
    "Entry",
    "GroupLasso",
    "MaxNorm",
    "Orthogonal",
    "Penalty",
    "Policy",
    "PolicyError",
    "RegwrapError",
    "RegwrapWarning",
    "StrengthScheduler",
    "UnmatchedRule",
    "WeightDecay",
    "Where",
    "attach",
    "param_groups",
    "penalties",
    "plan",
    "policy",
    "reg_loss",
    "regularize",
    "regularized",
    "sparsity",
    "summary",
    "unregularize",
]
