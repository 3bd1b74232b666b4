"""The optimizer side of a policy: its parameter groups, and what acts in its step."""

from regwrap.optimizers.attachment import Attachment, attach, sparsity
from regwrap.optimizers.groups import param_groups

__all__ = ["Attachment", "attach", "param_groups", "sparsity"]
