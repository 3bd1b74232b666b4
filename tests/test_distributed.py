"""DDP, FSDP2, tensor parallelism: values and gradients of a single process, on every rank.

The processes of a world are started once; every check runs in them, in order, and is a test here.
"""

import contextlib
import copy
import functools
import json
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, L2SP, DropConnect, Dropout, GroupLasso, Orthogonal, Penalty

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)

Check = Callable[[int, int], None]
CHECKS: dict[str, tuple[Check, tuple[int, ...]]] = {}


def check(*worlds: int) -> Callable[[Check], Check]:
    """Enters a function of (rank, world) that every process runs."""

    def enter(function: Check) -> Check:
        CHECKS[function.__name__] = (function, worlds)
        return function

    return enter


# ---- what the checks share -------------------------------------------------------------------


class Mlp(nn.Module):
    """Sizes that 4 ranks divide, and one that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).tanh()).tanh())


def built() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def batch() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def share(rank: int, world: int) -> Tensor:
    return batch().chunk(world)[rank]


DIRECT = {
    "": (L1(0.1, on="all"), L2(0.2)),
    "fc1": GroupLasso(0.05),
    "fc2": Orthogonal(0.3),
    "head": Penalty(torch.norm, 0.1),
}
SPLIT = {"": (L1(0.1, on="all"), L2(0.2))}


def single(rules: Any, steps: int = 1, **how: Any) -> nn.Module:
    """The single process after some steps on the whole batch, gradients of the last one kept."""
    model = rw.regularize(built(), rules)
    train(model, batch(), steps, **how)
    return model


def train(model: nn.Module, x: Tensor, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (model(x).square().mean() + rw.reg_loss(model)).backward()
        if step < steps - 1:
            optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_as_single(model: nn.Module, other: nn.Module) -> None:
    """The same gradients and penalties, to 1e-5."""
    ours, theirs = (dict(m.named_parameters()) for m in (model, other))
    for name, theirs_own in theirs.items():
        grad = whole(ours[name].grad)
        torch.testing.assert_close(grad, theirs_own.grad, rtol=1e-5, atol=1e-5)
    assert_same_penalties(model, other)


def assert_same_penalties(model: nn.Module, other: nn.Module) -> None:
    loss, found = rw.reg_loss(model), rw.penalties(model)
    assert type(loss) is Tensor
    torch.testing.assert_close(loss, rw.reg_loss(other), rtol=1e-5, atol=1e-5)
    assert list(found) == list(rw.penalties(other))
    for site, wanted in rw.penalties(other).items():
        torch.testing.assert_close(found[site], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(found.values()), loss)
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, (loss.item(), {k: v.item() for k, v in found.items()}))
    assert all(each == told[0] for each in told), told


def mesh(world: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


def shard(model: nn.Module, world: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.fc1, model.fc2):
        fully_shard(layer, mesh=mesh(world))
    return fully_shard(model, mesh=mesh(world))


def collectives(read: Callable[[], Any]) -> int:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as counted:
        read()
    return counted.get_total_counts()


# ---- DDP -------------------------------------------------------------------------------------


@check(2, 4)
def ddp_gives_the_single_process(rank: int, world: int) -> None:
    model = nn.parallel.DistributedDataParallel(rw.regularize(built(), DIRECT))
    train(model, share(rank, world), 3)
    assert_as_single(model.module, single(DIRECT, 3))
    assert rw.reg_loss(model) == model.module.reg_loss


@check(2)
def ddp_with_output_penalties(rank: int, world: int) -> None:
    rules = {"fc1": (L2(0.3, on="output"), L1(0.1)), "fc2": L1(0.2, on="output")}
    model = nn.parallel.DistributedDataParallel(rw.regularize(built(), rules))
    other = single(rules, 3)
    train(model, share(rank, world), 3)
    for name, p in model.module.named_parameters():
        torch.testing.assert_close(p.grad, other.get_parameter(name).grad, rtol=1e-5, atol=1e-5)


@check(2)
def ddp_with_no_sync_accumulates(rank: int, world: int) -> None:
    rules = {"fc1": (L2(0.3, on="output"), L1(0.1))}
    model = nn.parallel.DistributedDataParallel(rw.regularize(built(), rules))
    parts = share(rank, world).chunk(2)
    for part, context in zip(parts, (model.no_sync, contextlib.nullcontext), strict=True):
        with context():
            ((model(part).square().mean() + rw.reg_loss(model)) / 2).backward()
    other = single(rules)
    for name, p in model.module.named_parameters():
        torch.testing.assert_close(p.grad, other.get_parameter(name).grad, rtol=1e-5, atol=1e-5)


@check(2)
def regularize_takes_a_ddp_wrapper(rank: int, world: int) -> None:
    model = nn.parallel.DistributedDataParallel(built())
    assert rw.regularize(model, DIRECT) is model
    train(model, share(rank, world))
    assert_as_single(model.module, single(DIRECT))
    rw.unregularize(model)
    assert type(model.module) is Mlp


@check(2)
def ddp_with_weight_terms(rank: int, world: int) -> None:
    rules = {"": L1(0.1, solver="hadamard")}
    model = nn.parallel.DistributedDataParallel(rw.regularize(built(), rules))
    train(model, share(rank, world), 3)
    assert_as_single(model.module, single(rules, 3))
    model = nn.parallel.DistributedDataParallel(rw.regularize(built(), DropConnect(0.5)))
    torch.manual_seed(rank)  # every rank its own mask, as for a dropout
    train(model, share(rank, world), 3)
    told = [None] * world
    dist.all_gather_object(told, {k: v.tolist() for k, v in model.module.state_dict().items()})
    assert all(each == told[0] for each in told)


@check(2)
def ddp_compiled(rank: int, world: int) -> None:
    inner = rw.regularize(built(), DIRECT)
    model = torch.compile(nn.parallel.DistributedDataParallel(inner), backend="aot_eager")
    train(model, share(rank, world), 2)
    assert_as_single(inner, single(DIRECT, 2))
    assert rw.reg_loss(model) == inner.reg_loss


# ---- FSDP2 -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Its body is rewritten; the Linear in a stock Sequential gets a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


DROPPED = {"": L2(0.2), "0": Dropout(0.5), "1": Dropout(0.3, at="input")}
MECHANISMS = {"0.up": "fx", "0.down.0": "hook", "1.up": "fx", "1.down.0": "hook"}


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 3))


def dropping(model: nn.Module, inner: nn.Module, mechanisms: Any = MECHANISMS) -> None:
    """Every rank has the whole batch and the seed: the average is the single process."""
    rows = [row for row in rw.policy(inner).rows() if row["site"] == "call"]
    assert {row["path"]: row["mechanism"] for row in rows} == mechanisms
    other = rw.regularize(blocks(), DROPPED)
    for each in (model, other):
        torch.manual_seed(3)
        train(each, batch(), 2)
    assert_as_single(inner, other)


@check(2)
def dropouts_under_ddp(rank: int, world: int) -> None:
    inner = rw.regularize(blocks(), DROPPED)
    dropping(nn.parallel.DistributedDataParallel(inner), inner)
    wrapped = nn.parallel.DistributedDataParallel(blocks())
    rw.regularize(wrapped, DROPPED)
    dropping(wrapped, wrapped.module)


@check(2)
def dropouts_under_fsdp2(rank: int, world: int) -> None:
    dropping(*[shard_blocks(rw.regularize(blocks(), DROPPED), world)] * 2)
    model = rw.regularize(shard_blocks(blocks(), world), DROPPED)
    dropping(model, model, dict.fromkeys(MECHANISMS, "hook"))  # the owners have classes of FSDP's


def shard_blocks(model: nn.Module, world: int) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for part in (model[0], model[1], model):
        fully_shard(part, mesh=mesh(world))
    return model


@check(2, 4)
def fsdp2_after_regularize(rank: int, world: int) -> None:
    model = shard(rw.regularize(built(), DIRECT), world)
    train(model, share(rank, world), 3)
    assert_as_single(model, single(DIRECT, 3))


@check(2, 4)
def fsdp2_before_regularize(rank: int, world: int) -> None:
    model = rw.regularize(shard(built(), world), DIRECT)
    train(model, share(rank, world), 3)
    assert_as_single(model, single(DIRECT, 3))
    assert rw.reg_loss(model) == model.reg_loss


@check(2, 4)
def fsdp2_needs_one_collective(rank: int, world: int) -> None:
    model = rw.regularize(shard(built(), world), SPLIT)
    for _ in range(2):
        assert collectives(lambda: rw.reg_loss(model)) == 1
    (model(share(rank, world)).sum() + model.reg_loss).backward()
    assert collectives(lambda: model.reg_loss) == 1
    with torch.no_grad():
        assert collectives(lambda: model.reg_loss) == 1


@check(2)
def fsdp2_reads_in_every_state_of_its_parameters(rank: int, world: int) -> None:
    model = rw.regularize(shard(built(), world), SPLIT)
    other = rw.regularize(built(), SPLIT)
    torch.testing.assert_close(model.reg_loss, other.reg_loss)  # sharded
    model(share(rank, world))  # the root's own are unsharded until the backward
    torch.testing.assert_close(model.reg_loss, other.reg_loss)
    model.unshard()
    torch.testing.assert_close(model.reg_loss, other.reg_loss)
    model.reshard()
    torch.testing.assert_close(model.reg_loss, other.reg_loss)


@check(2)
def fsdp2_keeps_sharded_gradients(rank: int, world: int) -> None:
    model = rw.regularize(shard(built(), world), SPLIT)
    model.reg_loss.backward()
    other = rw.regularize(built(), SPLIT)
    other.reg_loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.placements == p.placements
        torch.testing.assert_close(whole(p.grad), other.get_parameter(name).grad)


@check(2)
def fsdp2_with_output_penalties(rank: int, world: int) -> None:
    rules = {"fc1": (L2(0.3, on="output"), L1(0.1)), "fc2": L2(0.1, when="called")}
    for model in (
        shard(rw.regularize(built(), rules), world),
        rw.regularize(shard(built(), world), rules),
    ):
        train(model, share(rank, world), 2)
        other = single(rules, 2)
        for name, p in model.named_parameters():
            wanted = other.get_parameter(name).grad
            torch.testing.assert_close(whole(p.grad), wanted, rtol=1e-5, atol=1e-5)


class Experts(nn.Module):
    """Each rank calls experts of its own, and one that all call."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.experts[rank % 2](x) + self.experts[2](x)


@check(2, 4)
def called_on_some_ranks_counts_by_their_share(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = rw.regularize(Experts(), L2(0.5, when="called"))
    squares = [expert.weight.square().sum().item() for expert in model.experts]
    wanted = [0.25 * share * s for share, s in zip((0.5, 0.5, 1, 0), squares, strict=True)]
    grads = [
        0.5 * share * expert.weight.detach()
        for share, expert in zip((0.5, 0.5, 1), model.experts, strict=False)
    ]
    alone = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    fully_shard(model, mesh=mesh(world))
    (0 * model(batch(), rank).sum()).backward()
    (0 * alone(batch(), rank).sum() + rw.reg_loss(alone)).backward()
    model.reg_loss.backward()
    assert collectives(lambda: model.reg_loss) == 2  # who ran, and the sum
    assert model.reg_loss.item() == pytest.approx(sum(wanted), rel=1e-5)
    found = rw.penalties(model)
    for i, value in enumerate(wanted):
        assert found[f"experts.{i}.weight"].item() == pytest.approx(value, rel=1e-5)
    for expert, same, grad in zip(model.experts, alone.module.experts, grads, strict=False):
        torch.testing.assert_close(whole(expert.weight.grad), grad)
        torch.testing.assert_close(same.weight.grad, grad)


@check(2)
def fsdp2_with_a_reference(rank: int, world: int) -> None:
    start = built().state_dict()
    rules = {"": L2SP(0.5, {k: v + 1 for k, v in start.items()})}
    for model in (
        shard(rw.regularize(built(), rules), world),
        rw.regularize(shard(built(), world), rules),
        rw.regularize(shard(built(), world), L2SP(0.5)),
    ):
        asked = rules if model.reg_loss > 0 else L2SP(0.5)
        train(model, share(rank, world), 2)
        assert_as_single(model, single(asked, 2))


@check(2)
def fsdp2_undo_after_fully_shard(rank: int, world: int) -> None:
    for model in (
        shard(rw.regularize(built(), DIRECT), world),
        rw.regularize(shard(built(), world), DIRECT),
    ):
        train(model, share(rank, world))
        rw.unregularize(model)
        assert [c.__name__ for c in type(model).__mro__[:3]] == ["FSDPMlp", "FSDPModule", "Mlp"]
        assert rw.reg_loss(model) == 0
        assert not hasattr(model, "reg_loss")
        train(model, share(rank, world))
        rw.regularize(model, SPLIT)
        train(model, share(rank, world))
        assert_as_single(model, single(SPLIT))


@check(2)
def fsdp2_in_half_precision(rank: int, world: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = rw.regularize(built(), SPLIT)
    fully_shard(model, mesh=mesh(world), mp_policy=half)
    (model(share(rank, world)).float().square().mean() + model.reg_loss).backward()
    assert model.reg_loss.dtype == torch.float32
    torch.testing.assert_close(model.reg_loss, rw.regularize(built(), SPLIT).reg_loss)
    other = single(SPLIT)
    for name, p in model.named_parameters():
        wanted = other.get_parameter(name).grad
        torch.testing.assert_close(whole(p.grad), wanted, rtol=0.05, atol=0.02)


@check(2)
def fsdp2_with_weight_terms_from_before(rank: int, world: int) -> None:
    rules = {"": L1(0.1, solver="hadamard")}
    model = shard(rw.regularize(built(), rules), world)
    train(model, share(rank, world), 3)
    assert_as_single(model, single(rules, 3))
    state = {name: whole(value) for name, value in model.state_dict().items()}
    plain = built()
    plain.load_state_dict(state, strict=True)
    with pytest.raises(rw.PolicyError, match="which fully_shard has sharded; load its state_dict"):
        rw.unregularize(model)
    rw.regularize(model, {"head": L2(0.1)})
    model = shard(rw.regularize(built(), DropConnect(0.5)), world)
    train(model, share(rank, world), 2)
    rw.regularize(model, {"": DropConnect(0.2)})
    train(model, share(rank, world), 2)


@check(2)
def fsdp2_refuses_weight_terms_afterwards(rank: int, world: int) -> None:
    message = re.escape(
        "DropConnect and L1(..., solver='hadamard') cannot be put on or taken from 'fc1' "
    )
    for term in (DropConnect(0.5), L1(0.1, solver="hadamard")):
        model = shard(built(), world)
        with pytest.raises(rw.PolicyError, match=message):
            rw.regularize(model, term)
        model = shard(rw.regularize(built(), term), world)
        with pytest.raises(rw.PolicyError, match="regularize the model before fully_shard"):
            rw.regularize(model, {"": None})
        train(model, share(rank, world))


@check(2)
def fsdp2_compiled(rank: int, world: int) -> None:
    inner = rw.regularize(shard(built(), world), SPLIT)
    model = torch.compile(inner, backend="aot_eager")
    train(model, share(rank, world), 2)
    assert_as_single(inner, single(SPLIT, 2))


@check(2)
def fsdp1_is_refused_by_name(rank: int, world: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    message = (
        "FullyShardedDataParallel flattens parameters, so that a penalty would see one shard only; "
        "wrap the model with torch.distributed.fsdp.fully_shard instead."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(built(), device_id=torch.device("cpu"))
        inside = nn.Sequential(FullyShardedDataParallel(built(), device_id=torch.device("cpu")))
        late = FullyShardedDataParallel(
            rw.regularize(built(), DIRECT), device_id=torch.device("cpu")
        )
    for act in (rw.regularize, rw.plan):
        with pytest.raises(rw.PolicyError, match=re.escape(message)):
            act(model, L2(0.1))
        with pytest.raises(rw.PolicyError, match="FullyShardedDataParallel at '0' flattens"):
            act(inside, L2(0.1))
    for read in (rw.reg_loss, rw.penalties, lambda m: rw.reg_loss(m.module), lambda m: m.reg_loss):
        with pytest.raises(rw.PolicyError, match=re.escape(message)):
            read(late)


# ---- tensor parallelism ----------------------------------------------------------------------


def parallel(model: nn.Module, world: int) -> nn.Module:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    return parallelize_module(model, mesh(world), plan)


@check(2, 4)
def tensor_parallel_after_regularize(rank: int, world: int) -> None:
    model = parallel(rw.regularize(built(), DIRECT), world)
    train(model, batch(), 3)
    assert_as_single(model, single(DIRECT, 3))


@check(2, 4)
def tensor_parallel_before_regularize(rank: int, world: int) -> None:
    model = rw.regularize(parallel(built(), world), DIRECT)
    train(model, batch(), 3)
    assert_as_single(model, single(DIRECT, 3))


@check(2, 4)
def replicated_parameters_count_once(rank: int, world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = rw.regularize(built(), SPLIT)
    places = {"fc1.weight": Replicate(), "fc1.bias": Replicate(), "fc2.weight": Shard(1)}
    for path, place in places.items():
        owner, _, name = path.rpartition(".")
        own = model.get_parameter(path)
        spread = nn.Parameter(distribute_tensor(own.data, mesh(world), [place]))
        setattr(model.get_submodule(owner), name, spread)
    model.reg_loss.backward()
    other = rw.regularize(built(), SPLIT)
    other.reg_loss.backward()
    assert_as_single(model, other)
    assert collectives(lambda: model.reg_loss) <= 1


@check(4)
def fsdp2_over_tensor_parallel(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    model = parallelize_module(rw.regularize(built(), SPLIT), grid["tp"], plan)
    fully_shard(model, mesh=grid["dp"])
    train(model, batch().chunk(2)[rank // 2], 2)
    assert_as_single(model, single(SPLIT, 2))


@check(2)
def tensor_parallel_with_weight_terms_on_top(rank: int, world: int) -> None:
    rules = {"": L1(0.1, solver="hadamard")}
    model = rw.regularize(parallel(built(), world), rules)
    train(model, batch(), 2)
    assert_as_single(model, single(rules, 2))
    rw.unregularize(model)
    assert whole(model.fc1.weight).shape == (16, 8)


# ---- distributed checkpoints -----------------------------------------------------------------


@check(2)
def distributed_checkpoints_have_plain_keys(rank: int, world: int) -> None:
    from torch.distributed.checkpoint import state_dict as dcp

    full = dcp.StateDictOptions(full_state_dict=True)
    for rules in (SPLIT, {"": DropConnect(0.5)}, {"": L1(0.1, solver="hadamard")}):
        model = shard(rw.regularize(built(), rules), world)
        train(model, share(rank, world), 2)
        for options in (None, full):
            state = dcp.get_model_state_dict(model, options=options)
            assert list(state) == list(built().state_dict())
            other = shard(rw.regularize(Mlp(), rules), world)
            found = dcp.set_model_state_dict(other, copy.deepcopy(state), options=options)
            assert not found.missing_keys
            assert not found.unexpected_keys
            for name, value in other.state_dict().items():
                assert torch.equal(whole(value), whole(model.state_dict()[name])), name
        state = dcp.get_model_state_dict(model, options=full)
        built().load_state_dict(state, strict=True)


# ---- running ---------------------------------------------------------------------------------


def _run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    init = f"file://{folder}/store"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init, timeout=limit, rank=rank, world_size=world)
    told = {}
    for name, (function, worlds) in CHECKS.items():
        if world in worlds:
            try:
                function(rank, world)
                told[name] = ""
            except Exception:
                told[name] = traceback.format_exc()
            torch.compiler.reset()
            dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


@functools.cache
def _told(world: int) -> list[dict[str, str]]:
    """What every rank says of every check."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (world, folder), nprocs=world)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def _cases() -> Iterator[Any]:
    for name, (_, worlds) in CHECKS.items():
        for world in worlds:
            yield pytest.param(name, world, id=f"{name}-{world}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), list(_cases()))
def test_every_rank_agrees(name: str, world: int) -> None:
    failures = [
        f"rank {rank}: {told[name]}" for rank, told in enumerate(_told(world)) if told[name]
    ]
    assert not failures, "\n".join(failures)
