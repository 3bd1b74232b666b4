"""The Trainer against a loop written by hand, to 1e-6."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments  # noqa: E402

import regwrap as rw  # noqa: E402
from regwrap import L2, PolicyError, WeightDecay  # noqa: E402
from regwrap.integrations.transformers import (  # noqa: E402
    RegularizedTrainer,
    RegularizedTrainerMixin,
)

pytestmark = [
    # the Trainer's advice on this machine: no GPU to pin memory for
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STRENGTH = 0.05


class Mlp(nn.Module):
    """A model of one's own; with `**kwargs` the Trainer takes its loss for scaled already."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.config = transformers.PretrainedConfig()  # label smoothing looks into it

    def forward(self, x, labels=None):
        logits = self.head(self.fc(x).tanh())
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class MlpWithKwargs(Mlp):
    """Divides by `num_items_in_batch`, as transformers' own models do."""

    def forward(self, x, labels=None, **kwargs):
        out = super().forward(x)
        count = kwargs.get("num_items_in_batch")
        if labels is not None and count is not None:
            out["loss"] = F.cross_entropy(out["logits"], labels, reduction="sum") / count
        elif labels is not None:
            out["loss"] = F.cross_entropy(out["logits"], labels)
        return out


class Data(Dataset):
    def __init__(self, n=28):
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=draw)
        self.y = torch.randint(3, (n,), generator=draw)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


def seeded(make):
    torch.manual_seed(0)
    return make()


def by_hand(model):
    return STRENGTH / 2 * (model.fc.weight.square().sum() + model.head.weight.square().sum())


def arguments(folder, **options):
    defaults = {
        "max_grad_norm": 0.0, "num_train_epochs": 2, "per_device_train_batch_size": 4,
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "weight_decay": 0.0,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(defaults | options))


class InOrder:
    """Batches in the order of the data, so that a loop by hand sees the same."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Ordered(InOrder, RegularizedTrainer):
    pass


def train(folder, model, cls=Ordered, **options):
    extra = {k: options.pop(k) for k in ("compute_loss_func", "optimizers") if k in options}
    trainer = cls(model, arguments(folder, **options), train_dataset=Data(), **extra)
    trainer.train()
    return trainer


def loop(model, accumulate=1, clip=0.0, smoothing=0.0):
    """AdamW by hand: the data loss over the whole step's samples, the penalty once a step."""
    data = Data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    batches = list(torch.arange(len(data)).split(4))
    model.train()
    for _ in range(2):
        for at in range(0, len(batches), accumulate):
            rows = torch.cat(batches[at : at + accumulate])
            logits = model(data.x[rows])["logits"]
            loss = F.cross_entropy(logits, data.y[rows], label_smoothing=smoothing)
            optimizer.zero_grad()
            (loss + by_hand(model)).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model


def assert_equal(ours, theirs, atol=1e-6):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("make", [Mlp, MlpWithKwargs])
@pytest.mark.parametrize(
    ("options", "by_loop"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 3}, {"accumulate": 3}),
        ({"max_grad_norm": 0.1}, {"clip": 0.1}),
        ({"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, {"accumulate": 2, "clip": 0.1}),
        ({"label_smoothing_factor": 0.1}, {"smoothing": 0.1}),
        (
            {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3},
            {"smoothing": 0.1, "accumulate": 3},
        ),
    ],
    ids=str,
)
def test_equals_the_loop(tmp_path, make, options, by_loop):
    model = rw.regularize(seeded(make), L2(STRENGTH))
    train(tmp_path, model, **options)
    assert_equal(model, loop(seeded(make), **by_loop))


def test_a_compute_loss_func(tmp_path):
    def total(outputs, labels, num_items_in_batch=None):
        whole = F.cross_entropy(outputs["logits"], labels, reduction="sum")
        return whole / (num_items_in_batch if num_items_in_batch is not None else len(labels))

    model = rw.regularize(seeded(Mlp), L2(STRENGTH))
    train(tmp_path, model, compute_loss_func=total, gradient_accumulation_steps=3)
    assert_equal(model, loop(seeded(Mlp), accumulate=3))


def test_what_the_obvious_ways_cost_under_accumulation(tmp_path):
    """Beside ours: transformers' own compute_loss_func, and `compute_loss + reg_loss`."""
    options = {"gradient_accumulation_steps": 3}
    right = loop(seeded(MlpWithKwargs), accumulate=3)
    theirs = rw.regularize(seeded(MlpWithKwargs), L2(STRENGTH))

    def with_penalty(outputs, labels, num_items_in_batch=None):
        data = F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch
        return data + theirs.reg_loss  # called for each of the three micro-batches

    class Unregularized(InOrder, Trainer):
        pass

    train(tmp_path, theirs, cls=Unregularized, compute_loss_func=with_penalty, **options)
    ours = rw.regularize(seeded(MlpWithKwargs), L2(STRENGTH))
    train(tmp_path, ours, **options)

    def away(model):
        pairs = zip(model.parameters(), right.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    print(f"ours {away(ours):.1e}, compute_loss_func {away(theirs):.1e}")
    assert away(ours) < 1e-6
    assert away(theirs) > 1e-3


def test_losses_are_logged_apart(tmp_path):
    model = rw.regularize(seeded(Mlp), L2(STRENGTH))
    start = by_hand(copy.deepcopy(model)).item()
    data = Data()
    trainer = Ordered(
        model, arguments(tmp_path, eval_strategy="epoch"), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    history = trainer.state.log_history
    first = next(row for row in history if "loss" in row)
    assert first["reg_loss"] == pytest.approx(start, abs=1e-6)
    plain = seeded(Mlp)(data.x[:4], data.y[:4])["loss"].item()
    assert first["loss"] == pytest.approx(plain, abs=1e-4)  # the Trainer rounds
    evaluated = [row for row in history if "eval_loss" in row]
    clean = model.eval()(data.x, data.y)["loss"].item()
    assert evaluated[-1]["eval_loss"] == pytest.approx(clean, abs=1e-4)
    assert not any("reg_loss" in row for row in evaluated)


def test_reg_loss_is_a_mean_between_logs(tmp_path):
    model = rw.regularize(seeded(Mlp), L2(STRENGTH))
    trainer = train(tmp_path, model, logging_steps=7)
    rows = [row["reg_loss"] for row in trainer.state.log_history if "loss" in row]
    other = rw.regularize(seeded(Mlp), L2(STRENGTH))
    every = train(tmp_path, other).state.log_history
    every = [row["reg_loss"] for row in every if "loss" in row]
    assert rows[0] == pytest.approx(sum(every[:7]) / 7, abs=1e-6)


def test_weight_decay_rules_become_groups(tmp_path):
    model = rw.regularize(seeded(Mlp), {"": WeightDecay(0.01), "head": WeightDecay(0.3)})
    trainer = train(tmp_path, model, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = trainer.optimizer.param_groups
    rates = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert rates == {"fc.weight": 0.01, "head.weight": 0.3, "fc.bias": 0.0, "head.bias": 0.0}

    plain = seeded(Mlp)
    data = Data()
    optimizer = torch.optim.AdamW(
        [
            {"params": [plain.fc.weight], "weight_decay": 0.01},
            {"params": [plain.head.weight], "weight_decay": 0.3},
            {"params": [plain.fc.bias, plain.head.bias], "weight_decay": 0.0},
        ],
        lr=0.05,
    )
    for _ in range(2):
        for rows in torch.arange(28).split(4):
            optimizer.zero_grad()
            plain(data.x[rows], data.y[rows])["loss"].backward()
            optimizer.step()
    assert_equal(model, plain)


def test_an_optimizer_that_does_not_carry_the_decay(tmp_path):
    model = rw.regularize(seeded(Mlp), WeightDecay(0.01))
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PolicyError, match="carried by no group of the optimizer; build it from"):
        train(tmp_path, model, optimizers=(own, None))
    own = torch.optim.SGD(rw.param_groups(model), lr=0.1)
    train(tmp_path, model, optimizers=(own, None))


def test_a_compute_loss_that_adds_it_already(tmp_path):
    class Twice(InOrder, RegularizedTrainerMixin, Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) + rw.reg_loss(model)

    model = rw.regularize(seeded(Mlp), L2(STRENGTH))
    with pytest.raises(PolicyError, match="adds reg_loss to its loss, and RegularizedTrainerMixin"):
        train(tmp_path, model, cls=Twice)
    assert "backward" not in vars(Twice)


def test_a_model_without_a_policy_trains_as_it_would(tmp_path):
    class Unregularized(InOrder, Trainer):
        pass

    ours, theirs = seeded(Mlp), seeded(Mlp)
    trainer = train(tmp_path, ours)
    train(tmp_path, theirs, cls=Unregularized)
    assert_equal(ours, theirs, atol=0)
    assert "backward" not in vars(trainer.accelerator)


def test_a_bert(tmp_path):
    """A real model, whose forward takes `**kwargs`; its dropouts are the same by the seed."""
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_labels=3, max_position_embeddings=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(20, (6,), generator=draw), "labels": i % 3} for i in range(12)
    ]

    class InRows(Ordered):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def make():
        return seeded(lambda: BertForSequenceClassification(config))

    model = rw.regularize(make(), {nn.Linear: L2(STRENGTH)})
    options = arguments(
        tmp_path, num_train_epochs=1, gradient_accumulation_steps=3, optim="sgd", learning_rate=0.1
    )
    InRows(model, options, train_dataset=rows).train()
    plain = make().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    linears = [m.weight for m in plain.modules() if isinstance(m, nn.Linear)]
    ids = torch.stack([r["input_ids"] for r in rows])
    labels = torch.tensor([r["labels"] for r in rows])
    loss = plain(input_ids=ids, labels=labels).loss
    # transformers' own: Bert takes **kwargs, so its mean loss is not divided by the three
    # micro-batches. The penalty counts once all the same.
    (3 * loss + STRENGTH / 2 * sum(w.square().sum() for w in linears)).backward()
    optimizer.step()
    assert_equal(model, plain)


@pytest.mark.parametrize("steps", [1, 3])
def test_accelerate_needs_no_integration(steps):
    """`accelerator.backward(loss + reg_loss)`, under accumulation too."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = rw.regularize(seeded(Mlp), L2(STRENGTH))
    data = Data(24)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(ours):
            loss = ours(**batch)["loss"]
            accelerator.backward(loss + rw.reg_loss(ours))
            optimizer.step()
            optimizer.zero_grad()
    plain = seeded(Mlp)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for rows in torch.arange(24).split(4 * steps):
        sgd.zero_grad()
        (plain(data.x[rows], data.y[rows])["loss"] + by_hand(plain)).backward()
        sgd.step()
    assert_equal(model, plain)
