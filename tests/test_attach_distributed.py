"""attach under DDP and FSDP2, with gloo processes: the weights of one process to 1e-5."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW

import regwrap as rw
from regwrap import L1, L2, L2SP, GroupLasso, MaxNorm, WeightDecay

RULES = {
    "0": L1(0.02) + L2(0.1) + MaxNorm(0.9),
    "2": GroupLasso(0.01) + L2SP(0.1),
    "4": GroupLasso(0.02, size=3) + WeightDecay(0.1),
    "6": GroupLasso(0.01, dim=1) + MaxNorm(0.5, dim=1),
}
MAKERS: dict[str, Any] = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0),
}
KINDS = ("ddp", "fsdp2", "fsdp2, then regularize")
STEPS = 12


def net() -> nn.Module:
    torch.manual_seed(0)
    sizes = [(6, 9), (9, 7), (7, 6), (6, 5)]  # not all divisible by the ranks
    layers = [m for i, o in sizes for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)


def train(model: nn.Module, optimizer: Any, rank: int, world: int) -> None:
    for step in range(STEPS):
        x, y = (t.chunk(world)[rank] for t in batch(step))
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + rw.reg_loss(model)).backward()
        optimizer.step()


def alone(name: str) -> dict[str, Tensor]:
    model = rw.regularize(net(), RULES)
    optimizer = MAKERS[name](model.parameters())
    rw.attach(model, optimizer)
    train(model, optimizer, 0, 1)
    return {k: p.detach() for k, p in model.named_parameters()}


def wrapped(kind: str, model: nn.Module, world: int) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(rw.regularize(model, RULES))
    mesh = init_device_mesh("cpu", (world,))
    if kind == "fsdp2, then regularize":
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return rw.regularize(fully_shard(model, mesh=mesh), RULES)
    rw.regularize(model, RULES)
    return fully_shard(model, mesh=mesh)


def work(rank: int, world: int, folder: str) -> None:
    """All cases in one set of processes: starting them is what takes the time."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    told = {(kind, name): case(kind, name, rank, world) for kind in KINDS for name in MAKERS}
    torch.save(told, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def case(kind: str, name: str, rank: int, world: int) -> tuple[Any, ...]:
    model = wrapped(kind, net(), world)
    optimizer = MAKERS[name](model.parameters())
    attachment = rw.attach(model, optimizer)
    train(model, optimizer, rank, world)
    whole = {
        k.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for k, p in model.named_parameters()
    }
    return whole, attachment.finalize(), rw.sparsity(model), rw.reg_loss(model).item()


@pytest.fixture(scope="module", params=[2, 4])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What every rank found, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_as_one_process(kind: str, name: str, told: list[Any]) -> None:
    expected = alone(name)
    ranks = [each[kind, name] for each in told]
    for weights, zeros, sparse, loss in ranks:
        assert weights.keys() == expected.keys()
        gap = max((weights[k] - w).abs().max().item() for k, w in expected.items())
        assert gap <= 1e-5
        assert (zeros, sparse, loss) == ranks[0][1:]
        assert zeros.keys() == {"0.weight", "2.weight", "4.weight", "6.weight"}
        assert loss == 0
    exact = {k: int((expected[k] == 0).sum()) for k in zeros}
    assert sum(exact.values()) > 0
    assert all(abs(zeros[k] - exact[k]) <= 1 for k in exact)
