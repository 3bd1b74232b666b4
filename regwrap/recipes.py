"""Ready-made rules from the literature: functions that return rules, each with its source.

rw.regularize(model, recipes.resnet())
rw.regularize(model, [*recipes.resnet(), ("fc", Dropout(0.5))])  # and one's own after them
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from regwrap.errors import UnmatchedRule
from regwrap.terms import L2, L2SP, Dropout, Term, WeightDecay
from regwrap.where import parse_where, shown

Rules = list[tuple[object, Term | None]]

_POSITIONS = re.compile(
    r"(.*\.)?(pos_embed\w*|position_embedding\w*|pos_embedding|cls_token|class_token|"
    r"class_embedding|dist_token|distillation_token|reg_token|register_tokens|mask_token|"
    r"relative_position_bias_table)(\.weight)?"
)
"""What vision transformers add to their patches: timm's, torchvision's and transformers' names."""


def bert_finetuning(rate: float = 0.01) -> Rules:
    """BERT's weight decay: 0.01 on every matrix, none on biases and LayerNorm.

    Use it with `param_groups` and AdamW. BERT's dropout of 0.1 is in the model already.

    Args:
        rate: the decay.

    Source: Devlin et al., BERT (2019), appendices A.2, A.3; `exclude_from_weight_decay` in
        google-research/bert, optimization.py.
    """
    return [("", WeightDecay(rate))]


def vit(model: nn.Module, rate: float = 0.05) -> Rules:
    """A vision transformer's weight decay: none on biases, norms, positions and class tokens.

    Args:
        model: whose names of positions and tokens are looked up.
        rate: 0.05 as in DeiT (AdamW); ViT itself took 0.03 to 0.3 with Adam.

    Source: Touvron et al., Training data-efficient image transformers (2021), table 9; Dosovitskiy
        et al., An image is worth 16x16 words (2021), appendix B.1; timm's `no_weight_decay`.
    """
    found = any(_POSITIONS.fullmatch(name) for name, _ in model.named_parameters())
    return [("", WeightDecay(rate)), *([(_POSITIONS, WeightDecay(0))] if found else [])]


def resnet(rate: float = 1e-4, *, everything: bool = False) -> Rules:
    """A ResNet's weight decay: 1e-4 on convolutions and the last layer.

    Args:
        rate: the decay, for SGD with momentum 0.9.
        everything: True as in the first paper, biases and BatchNorm too; False spares them.

    Source: He et al., Deep residual learning (2016), section 3.4; without biases and norms: He et
        al., Bag of tricks for image classification (2019), section 3.1.
    """
    return [("", WeightDecay(rate, on="all" if everything else "weight"))]


def l2_sp(head: object, strength: float = 0.1, head_strength: float = 0.01) -> Rules:
    """Fine-tuning that stays near the pretrained weights, with a plain L2 on the new head.

    Apply it when the pretrained weights are loaded: they are what the model is pulled toward.

    Args:
        head: the where of the layers that are new.
        strength: alpha, toward the pretrained weights.
        head_strength: beta, toward zero.

    Source: Li, Grandvalet and Davoine, Explicit inductive bias for transfer learning with
        convolutional networks (2018), section 4.
    """
    return [("", L2SP(strength)), (head, None), (head, L2(head_strength))]


def stochastic_depth(model: nn.Module, *ends: object, rate: float = 0.2) -> Rules:
    """Stochastic depth: whole residual branches are dropped, block l of L at rate * l / L.

    Args:
        model: whose blocks are counted, in module order.
        *ends: for each branch of a block, the where of the Linear layer that ends it, such as
            `"blocks.*.attn.proj"` and `"blocks.*.mlp.fc2"`.
        rate: of the last block.

    Raises:
        UnmatchedRule: when a where selects no module.

    Source: Huang et al., Deep networks with stochastic depth (2016), equation 4.
    """
    return [
        (path, Dropout(rate * (i + 1) / len(paths), kind=DropPath))
        for paths in (_selected(model, end) for end in ends)
        for i, path in enumerate(paths)
    ]


def _selected(model: nn.Module, end: object) -> list[str]:
    where = parse_where(end)
    paths = [path for path, m in model.named_modules() if where.selects_module(path, m)]
    if not paths:
        raise UnmatchedRule(
            f"stochastic_depth: {shown(end)!r} selects no module of {type(model).__name__}; name "
            "the Linear layer that ends each branch, as in 'blocks.*.mlp.fc2'."
        )
    return paths


class DropPath(nn.Module):
    """Drops whole samples, not elements: in training y -> y * mask / (1 - p), one draw a sample.

    Args:
        p: the rate, in [0, 1).

    Source: Huang et al., Deep networks with stochastic depth (2016).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Each sample of the batch (dimension 0), whole or zero."""
        if not self.training or self.p == 0:
            return x
        shape = (x.shape[0], *(1 for _ in x.shape[1:]))
        kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)

    def extra_repr(self) -> str:
        """The rate."""
        return f"p={self.p}"
