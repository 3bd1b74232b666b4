"""Lightning's callback against the same module with the penalty written into its step."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the import's own deprecations
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers.logger import Logger
    from lightning.pytorch.plugins import MixedPrecision

    from regwrap.integrations.lightning import RegularizationCallback

import regwrap as rw
from regwrap import L1, L2, PolicyError, WeightDecay

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # it advises on workers, on loggers and on GPUs; none of it is the case here
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*srun.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*"),
]

RULES = {"model": L2(0.05) + L1(0.003), "model.2": L2(0.2)}


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def by_hand(model):
    """The penalties of RULES as one would write them."""
    first, last = model[0].weight, model[2].weight
    l1 = first.abs().sum() + last.abs().sum()
    return 0.05 / 2 * first.square().sum() + 0.2 / 2 * last.square().sum() + 0.003 * l1


class Plain(LightningModule):
    def __init__(self, late=False, optimizer=torch.optim.Adam):
        super().__init__()
        self.late, self.make = late, optimizer
        if not late:
            self.model = layers()

    def configure_model(self):
        if self.late and not hasattr(self, "model"):
            self.model = layers()

    def penalty(self):
        return 0.0

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        return loss + self.penalty()

    def configure_optimizers(self):
        return self.make(self.model.parameters(), lr=0.05)


class ByHand(Plain):
    def penalty(self):
        return by_hand(self.model)


class Manual(Plain):
    """Manual optimization, with an accumulation and a clipping of its own."""

    def __init__(self, every=1):
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self.model(x), y) + self.penalty()
        self.manual_backward(loss / self.every)
        if (index + 1) % self.every == 0:
            optimizer = self.optimizers()
            self.clip_gradients(optimizer, 0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


class ManualByHand(Manual):
    def penalty(self):
        return by_hand(self.model)


class Memory(Logger):
    """Keeps what is logged."""

    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


def data():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(28, 6, generator=draw)
    y = torch.randint(3, (28,), generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=4)  # 7 batches: accumulations end ragged


def fit(module, *callbacks, logger=False, **options):
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=logger, callbacks=list(callbacks),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, **options,
    )  # fmt: skip
    trainer.fit(module, data())
    return module.model


def assert_equal(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def moved(model):
    return max(
        (a - b).abs().max() for a, b in zip(model.parameters(), layers().parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_automatic_optimization(options):
    ours = fit(Plain(), RegularizationCallback(RULES), **options)
    theirs = fit(ByHand(), **options)
    assert_equal(ours, theirs)
    assert moved(ours) > 0.1
    plain = fit(Plain(), **options)
    assert (
        max((a - b).abs().max() for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
        > 1e-3
    )


def test_16_mixed():
    """Under a gradient scaler the hook sees the scaled loss."""

    def plugin():
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024))

    ours = fit(Plain(), RegularizationCallback(RULES), plugins=[plugin()])
    theirs = fit(ByHand(), plugins=[plugin()])
    assert_equal(ours, theirs)
    assert moved(ours) > 0.1


@pytest.mark.parametrize("every", [1, 3])
def test_manual_optimization(every):
    ours = fit(Manual(every), RegularizationCallback(RULES, accumulate=every))
    assert_equal(ours, fit(ManualByHand(every)))
    assert moved(ours) > 0.1


def test_lbfgs_runs_its_closure_several_times():
    make = lambda parameters, lr: torch.optim.LBFGS(parameters, lr=lr)  # noqa: E731 as short
    ours = fit(Plain(optimizer=make), RegularizationCallback(RULES))
    assert_equal(ours, fit(ByHand(optimizer=make)))


def test_a_plain_pytorch_loop():
    ours = fit(Plain(), RegularizationCallback(RULES))
    model = layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(2):
        for x, y in data():
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + by_hand(model)).backward()
            optimizer.step()
    assert_equal(ours, model)


def test_layers_made_in_configure_model():
    module = Plain(late=True)
    ours = fit(module, RegularizationCallback(RULES))
    assert_equal(ours, fit(ByHand()))
    assert "configure_model" not in vars(module)


def test_a_policy_that_is_there_already():
    module = Plain()
    rw.regularize(module.model, {"": L2(0.05) + L1(0.003), "2": L2(0.2)})
    assert_equal(fit(module, RegularizationCallback()), fit(ByHand()))


def test_the_penalty_is_logged_apart_from_the_loss():
    logged, plain = Memory(), Memory()
    start = copy.deepcopy(layers())
    fit(Plain(), RegularizationCallback(RULES), logger=logged)
    fit(Plain(), logger=plain)
    first = next(row for row in logged.seen if "reg_loss" in row)
    assert first["reg_loss"] == pytest.approx(by_hand(start).item(), abs=1e-6)
    assert first["train_loss"] == plain.seen[0]["train_loss"]
    silent = Memory()
    fit(Plain(), RegularizationCallback(RULES, log=False), logger=silent)
    assert not any("reg_loss" in row for row in silent.seen)


@pytest.mark.parametrize("make", [ByHand, ManualByHand])
def test_a_step_that_adds_it_already(make):
    class Twice(make):
        def penalty(self):
            return self.reg_loss

    with pytest.raises(PolicyError) as caught:
        fit(Twice(), RegularizationCallback(RULES))
    assert str(caught.value) == (
        "The training step adds reg_loss to its loss, and RegularizationCallback adds it again; "
        "take it out of the step, or do not use RegularizationCallback."
    )


def test_weight_decay_that_nobody_carries():
    rules = {"model.0": WeightDecay(0.1)}
    with pytest.raises(PolicyError) as caught:
        fit(Plain(), RegularizationCallback(rules))
    assert str(caught.value) == (
        "WeightDecay(0.1) of model.0.weight is carried by no group of the optimizer; build it "
        "from regwrap.param_groups(model)."
    )

    class Carried(Plain):
        def configure_optimizers(self):
            return torch.optim.AdamW(rw.param_groups(self, weight_decay=0.0), lr=0.05)

    fit(Carried(), RegularizationCallback(rules))


def test_a_second_fit_adds_nothing_twice():
    module, callback = Plain(), RegularizationCallback(RULES)
    fit(module, callback)
    before = rw.policy(module)
    fit(module, callback)
    assert rw.policy(module) == before
