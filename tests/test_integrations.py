"""What the trainers share: whether a loss has the penalties in it already."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regwrap as rw
from regwrap import L1, L2, L2SP, ElasticNet, GroupLasso, Orthogonal, Penalty
from regwrap.integrations.common import contains_penalties


class Cosine(nn.Module):
    """Squares its head's weight, as L2 does, on the way to the logits."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        w = self.head.weight
        return F.normalize(self.fc(x).tanh()) @ (w / w.pow(2).sum(1, keepdim=True).sqrt()).T


class Positive(Cosine):
    def forward(self, x):
        return self.fc(x).tanh() @ self.head.weight.abs().T


@pytest.mark.parametrize("make", [Cosine, Positive])
@pytest.mark.parametrize(
    "rules",
    [
        {"head": L2(0.1)},
        {"head": L1(0.1)},
        {"head": ElasticNet(0.1, 0.5)},
        {"": L2(0.1), "fc": L1(0.1, on="output")},
        {"": L1(0.1), "head": L2SP(0.1)},
        {"fc": [Orthogonal(0.1), GroupLasso(0.1)]},
        {"head": Penalty(torch.linalg.vector_norm, 0.1)},
    ],
)
def test_penalties_in_a_loss_are_seen_and_a_forward_is_not_taken_for_them(make, rules):
    torch.manual_seed(0)
    model = rw.regularize(make(), rules)
    logits = model(torch.randn(5, 4))
    for loss in (F.cross_entropy(logits, torch.arange(5) % 3), (logits - 1).square().mean()):
        assert not contains_penalties(model, loss)
        assert contains_penalties(model, (loss + model.reg_loss) / 4)
        by_site = torch.stack(list(rw.penalties(model).values()))
        assert contains_penalties(model, (loss.double() + 0.5 * by_site.sum()) * 1024)
