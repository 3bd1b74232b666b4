"""Reading owners and writing them anew: never wrong silently, undone without a trace."""

import copy
import gc
import importlib.util
import inspect
import io
import itertools
import linecache
import multiprocessing
import pickle
import threading
import warnings
import weakref

import adversaries
import pytest
import torch
import torch.nn.functional as F
from adversaries import ADVERSARIES, RATE, Two, check, hook_all, rewrite_all, run, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from regwrap import graph
from regwrap.errors import PolicyError
from regwrap.surgery import fx
from regwrap.surgery.fx import Insert

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def globals_restored():
    yield
    adversaries.GAIN = 2.0
    torch.set_grad_enabled(True)


# ---- adversaries -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ADVERSARIES, ids=str)
def test_an_adversary_is_the_hooked_model_or_is_refused(case):
    verdicts = check(case.build, case.inputs, case.later)
    for verdict in verdicts.values():
        assert verdict.by_fx or verdict.reason or verdict.never_called
    if case.fx is not None:
        assert " ".join(p for p, v in verdicts.items() if v.by_fx) == case.fx


def test_there_are_enough_adversaries():
    assert len(ADVERSARIES) >= 60


def test_a_reason_is_one_sentence_of_plain_words():
    expected = {
        "stock_sequential": ("0", "the owner is a stock nn.Sequential"),
        "patched_forward": ("fc", "forward was replaced on the instance"),
        "IsNotNone": ("out", "forward branches on `mask is not None`"),
        "LoopOverLayers": ("layers.0", "forward loops over `self.layers`"),
        "NoGradInside": ("fc", "forward runs it inside `with torch.no_grad()`"),
        "Decorated": ("fc", "forward is decorated"),
        "SuperInBranch": ("fc", "forward uses `super`"),
        "edited_source": ("fc", "forward has a source that is not the code that runs"),
        "EarlyReturn": ("out", "forward branches on `y.sum() > 1000000000.0`"),
        "LayerKept": ("fc", "it or what holds it is also kept in `kept` of a LayerKept"),
    }
    cases = {c.name: c for c in ADVERSARIES}
    for name, (path, reason) in expected.items():
        assert graph.survey(cases[name].build())[path].reason == reason


# ---- bodies at random ------------------------------------------------------------------------

EXPRESSIONS = (
    "self.fc({a})",
    "self.fc2({a})",
    "self.fc({a}) + self.fc2({b})",
    "self.act(self.fc({a}))",
    "self.act(self.act2(self.fc2({a})) * {b})",
    "self.drop({a})",
    "F.dropout({a}, self.rate, self.training)",
    "F.relu({a})",
    "{a}.tanh()",
    "{a}.view(-1).view(3, 4)",
    "{a} * self.scale + {b}",
    "{a} - {b} / 2",
    "-{a}",
    "{a} * ({b} > 0)",
    "{a} + torch.randn_like({b})",
    "{a} * torch.rand(1)",
    "self.help({a})",
    "self.help({a}, {b})",
    "outside({a}, 2)",
    "torch.cat([{a}[:, :2], {b}[:, 2:]], dim=-1)",
    "torch.stack(({a}, {b})).sum(0)",
    "{a} if self.flag else {b}",
    "self.fc({a}) if {b}.sum() > 0 else {a}",
    "({a} if {a}.sum() > 0 else {b}) * 2",
    "{a}.clone()",
    "{a}.detach() + {b}",
    "(z := self.fc2({a})) + {b}",
    "sum([{a} * i for i in range(3)])",
    "self.layers[0]({a})",
    "self.layers[-1](self.layers[0]({a}))",
    "self.pair({a}, other={b})",
    "self.pair(*({a}, {b}))",
    "self.hook_like(self.fc, {a})",
    "getattr(self, 'fc2')({a})",
)
STATEMENTS = (
    "{v} = {e}",
    "{v} = {e}",
    "{v} = {e}",
    "{v} = {w} = {e}",
    "{v} += {e}",
    "{v} *= 2",
    "{v} = {w}",
    "{v}.mul_(0.5)",
    "{v}[:, 0] = 1.0",
    "{v}, {w} = {e}, {f}",
    "{v}, {w} = ({e}).chunk(2, dim=0) if False else ({f}, {e})",
    "if {v}.mean() > {w}.mean():\n    {v} = {e}\nelse:\n    {w} = {f}",
    "if self.flag:\n    {v} = {e}",
    "if {v}.mean() > 0:\n    late = {e}\nelse:\n    late = {f}\n{w} = late",
    "for i in range(2):\n    {v} = {e}",
    "for layer in self.layers:\n    {v} = layer({v})",
    "with torch.no_grad():\n    {v} = {e}",
    "try:\n    {v} = {e}\nexcept ValueError:\n    {v} = {w}",
    "self.kept = {e}",
    "self.count.add_(1)",
    "assert {v}.dim() == 2",
    "if {v}.sum() > 1e6:\n    return {w}",
    "del {v}\n{v} = {w} * 1",
    "self.scale = self.scale + 0.5",
)
RETURNS = ("return {v}", "return {v}, {w}", "return {{'v': {v}, 'e': {e}}}", "return [{e}, {w}]")

TEMPLATE = """
import torch
import torch.nn.functional as F
from torch import nn


def outside(x, n):
    return x * n


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, other=None):
        return self.inner(x) if other is None else self.inner(other) - x


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.act, self.act2, self.drop = nn.GELU(), nn.ReLU(), nn.Dropout(0.2)
        self.pair = Pair()
        self.rate, self.scale, self.flag = 0.3, 0.5, True
        self.register_buffer("count", torch.zeros(()))

    def hook_like(self, layer, x):
        return layer(x)

    def help(self, x, other=None):
        {helper}

    def forward(self, x):
        y = x * 1.0
        z = x + 1.0
        {body}
"""
VARIABLES = ("x", "y", "z")


@st.composite
def statements(draw, most):
    lines = []
    names = st.sampled_from(VARIABLES)

    def expression():
        return draw(st.sampled_from(EXPRESSIONS)).format(a=draw(names), b=draw(names))

    for _ in range(draw(st.integers(1, most))):
        text = draw(st.sampled_from(STATEMENTS))
        v, w = draw(st.permutations(VARIABLES))[:2]
        lines += text.format(v=v, w=w, e=expression(), f=expression()).split("\n")
    text = draw(st.sampled_from(RETURNS))
    lines.append(text.format(v=draw(names), w=draw(names), e=expression()))
    return lines


@st.composite
def sources(draw):
    helper = ["y = x if other is None else other", "z = x * 2", *draw(statements(2))]
    safe = [line.replace("self.help(", "outside(2, ") for line in helper]  # it ends
    body = draw(statements(6))
    space = "\n        "
    return TEMPLATE.format(helper=space.join(safe), body=space.join(body))


NUMBER = itertools.count()


def loaded(source, folder):
    path = folder / f"body_{next(NUMBER)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows():
    return (torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),), {}


TALLY = {"fx": 0, "hook": 0, "never": 0}


def compare_body(source, folder):
    module = loaded(source, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts = check(module.Body, rows)
    finally:
        linecache.clearcache()
    for v in verdicts.values():
        TALLY["fx" if v.by_fx else "never" if v.never_called else "hook"] += 1


RELAXED = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
}


@settings(max_examples=300, **RELAXED)
@given(source=sources())
def test_random_bodies(source, tmp_path_factory):
    compare_body(source, tmp_path_factory.mktemp("bodies"))


@pytest.mark.bench  # left out by default; `-m bench -s` prints how many layers were rewritten
@settings(max_examples=5000, **{**RELAXED, "derandomize": False})
@given(source=sources())
def test_random_bodies_5000(source, tmp_path_factory):
    compare_body(source, tmp_path_factory.mktemp("bodies"))
    print(end=f"\r{TALLY}")


# ---- answers ---------------------------------------------------------------------------------


class Questions(nn.Module):
    def __init__(self):
        super().__init__()
        for name in "abcdefghij":
            setattr(self, name, nn.Linear(4, 4))
        self.relu, self.drop, self.p = nn.ReLU(), nn.Dropout(0.1), 0.2
        self.function = F.gelu

    def forward(self, x):
        x = self.relu(self.a(x))
        x = self.drop(F.silu(self.b(x)))
        x = F.dropout(self.c(x), self.p, self.training)
        x = self.d(x).relu() + self.d(x)
        x = torch.tanh(self.e(x)) * self.f(x)
        x = F.gelu(self.g(x), approximate="tanh")
        x = self.function(self.h(x))
        h = self.i(x)
        return h, torch.sigmoid(h)


def test_what_follows_a_call():
    verdicts = graph.survey(Questions())
    found = {path: v.sites[0].calls for path, v in verdicts.items() if v.sites}

    def first(path):
        return found[path][0]

    assert first("a").activation == graph.Activation("ReLU", "relu", True)
    assert first("b").activation == graph.Activation("silu", None, False)
    assert first("b").dropout == graph.Existing("drop", None, "silu")
    assert first("c").dropout == graph.Existing(None, "p", "")
    assert [c.activation and c.activation.name for c in found["d"]] == ["relu", None]
    assert first("e").activation.name == "tanh"
    assert first("f").activation is None
    assert first("f").follower == "a product, which is no activation"
    assert first("g").activation.name == "gelu"
    assert first("h").activation.name == "gelu"
    assert first("i").activation is None
    assert first("i").returned
    assert not first("a").returned
    assert verdicts["j"].never_called


def test_a_sequential_says_what_follows():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 4))
    verdicts = graph.survey(model)
    call = verdicts["0"].sites[0].calls[0]
    assert call.activation == graph.Activation("ReLU", "1", True)
    assert call.dropout == graph.Existing("2", None, "ReLU")
    assert verdicts["3"].sites[0].calls[0].returned
    assert not verdicts["0"].by_fx


@pytest.mark.parametrize("name", ["AliasThenAugment", "Walrus", "SwiGLU", "Indexed", "DoubleCall"])
def test_the_calls_are_those_that_torch_fx_records(name):
    model = getattr(adversaries, name)()
    recorded = torch.fx.Tracer().trace(model)
    ours = graph.trace(model)
    assert [n.target for n in ours.nodes if n.op == "call_module"] == [
        n.target for n in recorded.nodes if n.op == "call_module"
    ]


def test_nothing_of_the_model_runs_and_nothing_is_patched():
    class Loud(Two):
        armed = False

        @property
        def factor(self):
            return 1.0 / (not self.armed)

        def forward(self, x):
            return self.out(self.fc(x)) * self.factor / (not self.armed)

    model, before = Loud(), (nn.Module.__call__, nn.Module.__getattr__)
    model.armed = True
    failures, stop = [], threading.Event()

    def other():
        layer = Two()
        while not stop.is_set():
            try:
                layer.fc(torch.ones(4))
                assert (nn.Module.__call__, nn.Module.__getattr__) == before
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    try:
        for case in ADVERSARIES[:40]:
            graph.survey(case.build())
        verdict = graph.survey(model)["fc"]
    finally:
        stop.set()
        thread.join()
    assert verdict.by_fx
    assert not failures


def test_equal_blocks_are_read_once(monkeypatch):
    read = []
    real = graph.Tracer.write
    monkeypatch.setattr(graph.Tracer, "write", lambda self: (read.append(1), real(self))[1])

    class Block(Two):
        def forward(self, x):
            return x + self.out(self.act(self.fc(x)))

    model = nn.Sequential(*(Block() for _ in range(200)))
    verdicts = graph.survey(model)
    assert all(v.by_fx for v in verdicts.values())
    rewrite_all(model, verdicts)
    assert len(read) <= 4  # once for the survey, once for the rewrite's question, once to write
    assert len({type(b) for b in model}) == 1


def test_a_block_with_another_layout_is_read_by_itself():
    class Block(Two):
        def forward(self, x):
            return self.out(self.act(self.fc(x)))

    other = Block()
    other.act = nn.Sequential(nn.Linear(4, 4))
    model = nn.Sequential(Block(), other, Block())
    verdicts = graph.survey(model)
    assert [bool(verdicts[f"{i}.fc"].sites[0].calls[0].activation) for i in range(3)] == [
        True,
        False,
        True,
    ]


def test_classes_can_be_collected():
    def made(folder):
        module = loaded(TEMPLATE.format(helper="return x", body="return self.fc(x)"), folder)
        model = module.Body()
        rewrite_all(model, graph.survey(model))
        model(torch.ones(1, 4))
        return weakref.ref(module.Body), weakref.ref(type(model))

    import tempfile
    from pathlib import Path

    refs = made(Path(tempfile.mkdtemp()))
    gc.collect()
    assert [r() for r in refs] == [None, None]
    assert not any("Body.forward" in name for name in linecache.cache)


# ---- the rewritten object --------------------------------------------------------------------


class Plain(nn.Module):
    """Somebody's model."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.act = nn.ReLU()
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, shift: float = 0.0) -> torch.Tensor:
        """Its forward."""
        return self.out(self.act(self.fc(x))) * scale + shift


def rewritten(p=0.5, at="output"):
    torch.manual_seed(0)
    model = Plain()
    fx.rewrite(model, [Insert("fc", p, at=at)])
    return model


def test_it_looks_like_the_plain_object():
    model, plain = rewritten(), Plain()
    cls = type(model)
    assert isinstance(model, Plain)
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__, type(cls)) == (
        Plain.__name__,
        Plain.__qualname__,
        Plain.__module__,
        Plain.__doc__,
        type(Plain),
    )
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert model.forward.__doc__ == "Its forward."
    assert inspect.get_annotations(model.forward) == inspect.get_annotations(plain.forward)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_children()][:3] == ["fc", "act", "out"]
    assert "regwrap_dropout_fc" in repr(model)
    assert "regwrap_dropout_fc(" in inspect.getsource(type(model).forward)
    assert type(type(model)(8)) is Plain


def test_the_dropout_modules_mode_decides():
    model = rewritten().eval()
    x = torch.ones(64, 4)
    quiet = model(x)
    model.regwrap_dropout_fc.train()  # what Monte Carlo dropout does by hand
    assert not torch.equal(model(x), quiet)
    model.train()
    model.regwrap_dropout_fc.eval()
    assert torch.equal(model(x), quiet)


@pytest.mark.parametrize("at", ["output", "activation", "input"])
def test_places(at):
    model, plain = rewritten(at=at), Plain()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 4)
    torch.manual_seed(1)
    ours = model(x)
    torch.manual_seed(1)
    drop = {k: (lambda v: v) for k in ("input", "output", "activation")}
    drop[at] = lambda v: F.dropout(v, 0.5)
    theirs = plain.out(drop["activation"](plain.act(drop["output"](plain.fc(drop["input"](x))))))
    assert torch.equal(ours, theirs * 2.0 + 0.0)


def test_relu_commutes_with_dropout_exactly():
    x = torch.randn(64, 4)
    results = []
    for at in ("output", "activation"):
        model = rewritten(at=at)
        torch.manual_seed(1)
        results.append(model(x))
    assert torch.equal(*results)


def test_no_activation_is_an_error_and_changes_nothing():
    model = Plain()
    with pytest.raises(PolicyError, match=r"no elementwise activation .* use at='output'"):
        fx.rewrite(model, [Insert("out", 0.5, at="activation")])
    assert type(model) is Plain
    assert list(model._modules) == ["fc", "act", "out"]


def test_an_unsafe_owner_is_an_error_and_changes_nothing():
    model = adversaries.LoopOverRange()
    with pytest.raises(PolicyError, match="loops over `range"):
        fx.rewrite(model, [Insert("fc", 0.5)])
    assert type(model) is adversaries.LoopOverRange


def test_names_do_not_clash():
    model = Plain()
    model.regwrap_dropout_fc = nn.Identity()
    model.regwrap_dropout_fc_1 = 3
    fx.rewrite(model, [Insert("fc", 0.5)])
    assert isinstance(model.regwrap_dropout_fc_2, nn.Dropout)
    fx.restore(model)
    assert list(model._modules) == ["fc", "act", "out", "regwrap_dropout_fc"]


def test_a_second_rewrite_replaces_the_first():
    model = rewritten()
    fx.rewrite(model, [Insert("out", 0.25)])
    assert [n for n in model._modules if "regwrap" in n] == ["regwrap_dropout_out"]
    with pytest.raises(PolicyError):
        fx.rewrite(model, [Insert("nothing", 0.25)])
    assert [n for n in model._modules if "regwrap" in n] == ["regwrap_dropout_out"]
    fx.rewrite(model, [])
    assert type(model) is Plain


def _trained(model):
    torch.manual_seed(3)
    return model(torch.ones(8, 4))


def through_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_save],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_copies_drop_alike_and_are_undone_by_themselves(copied):
    model = rewritten()
    twin = copied(model)
    assert torch.equal(_trained(model), _trained(twin))
    if copied is not copy.copy:
        fx.restore(twin)
        assert type(twin) is Plain
        assert list(twin._modules) == ["fc", "act", "out"]
        assert isinstance(model.regwrap_dropout_fc, nn.Dropout)
        assert fx.rewritten(model) is not None


def _in_child(model, queue):
    queue.put(_trained(model).tolist())


def test_another_process():
    model = rewritten()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_in_child, args=(model, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join()
    assert found == _trained(model).tolist()


class Copies(Plain):
    def __deepcopy__(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


class Reduces(Plain):
    def __reduce__(self):
        return (Reduces, (4,), self.__getstate__() if hasattr(self, "__getstate__") else {})


@pytest.mark.parametrize("cls", [Copies, Reduces])
def test_the_authors_own_ways_of_copying(cls):
    model = cls()
    fx.rewrite(model, [Insert("fc", 0.5)])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_trained(model), _trained(twin))
        fx.restore(twin)
        assert type(twin) is cls


class Registered(nn.Module):
    made = []

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Registered.made.append(cls)


class Member(Registered):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)


def test_no_subclass_is_seen_by_the_authors_registry():
    model = Member()
    fx.rewrite(model, [Insert("fc", 0.5)])
    assert Registered.made == [Member]


def test_a_class_put_on_top_stays_there():
    model = rewritten()
    below = type(model)
    top = type("Top", (below,), {"extra": 1})
    model.__class__ = top
    fx.restore(model)
    assert isinstance(model, Plain)
    assert model.extra == 1
    assert fx.rewritten(model) is None


@pytest.mark.filterwarnings("ignore")
def test_compile_makes_one_graph():
    model = rewritten()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.ones(8, 4)
    torch.manual_seed(3)
    dropped = compiled(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, model(x))
    assert len(graphs) == 1
    model.eval()
    assert torch.equal(compiled(x), model(x))
    fx.restore(model)
    model.train()
    assert torch.equal(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["BothBranchesSet", "LateBranchReturn", "StarCalls", "Slices"])
def test_parts_compile_where_the_plain_body_does(name):
    case = next(c for c in ADVERSARIES if c.name == name)
    torch.manual_seed(0)
    plain, model = case.build(), case.build()
    model.load_state_dict(plain.state_dict())
    rewrite_all(model, graph.survey(model), 0.0)
    args, kwargs = case.inputs()

    def compiled(module):
        torch._dynamo.reset()
        try:
            return torch.compile(module, fullgraph=True, backend="eager")(*args, **kwargs)
        except Exception as error:
            return type(error)

    theirs = compiled(plain)
    assert same(compiled(model), theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model = rewritten().train(training)
    program = torch.export.export(model, (torch.ones(2, 4),))
    assert ("dropout" in str(program.graph)) == training


def test_training_keeps_no_more_alive_than_the_plain_body():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.probe = Probe()

        def forward(self, x):
            y = self.fc(x)
            self.probe.watch(y)
            y = y + 1
            y = y + 1
            return self.probe(y)

    model = Chain()
    fx.rewrite(model, [Insert("fc", 0.5)])
    with torch.no_grad():
        model(torch.ones(1, 4))
    assert model.probe.dead


class Probe(nn.Module):
    def watch(self, value):
        self.ref = weakref.ref(value)

    def forward(self, x):
        self.dead = self.ref() is None
        return x


def test_hooks_and_rewrites_agree_over_training():
    torch.manual_seed(0)
    plain = Plain()
    verdicts = graph.survey(plain)
    ours, theirs = copy.deepcopy(plain), copy.deepcopy(plain)
    rewrite_all(ours, verdicts)
    hook_all(theirs, verdicts)
    for model in (ours, theirs):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(16, 4)).square().sum().backward()
            optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert RATE > 0
    assert run(ours.eval(), rows).output.equal(run(theirs.eval(), rows).output)


def test_the_super_chain_survives_copies():
    model = adversaries.SuperTwice()
    verdicts = graph.survey(model)
    methods = {c.method for v in verdicts.values() for site in v.sites for c in site.calls}
    assert methods == {"help", "forward@adversaries.Based", "help@adversaries.Middle"}
    rewrite_all(model, verdicts)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(_trained(model), _trained(twin))
    fx.restore(twin)
    assert type(twin) is adversaries.SuperTwice


def test_code_that_was_replaced_is_read_anew(monkeypatch):
    model = adversaries.HandsSelfToHarmless()
    assert graph.survey(model)["fc"].by_fx
    monkeypatch.setattr(adversaries, "reads_scale", lambda module, x: module.fc(x))
    assert not graph.survey(model)["fc"].by_fx

    class Patched(Two):
        def forward(self, x):
            return self.out(self.fc(x))

    model = Patched()
    assert graph.survey(model)["fc"].by_fx

    def forward(self, x):
        return self.out(x)

    Patched.forward = forward
    assert graph.survey(model)["fc"].never_called
    Patched.forward = adversaries.LoopOverRange.forward
    assert graph.survey(model)["fc"].reason == "forward loops over `range(2)`"


def test_a_rewritten_model_reads_as_the_plain_one():
    model = Plain()
    before = graph.survey(model)
    rewrite_all(model, before)
    assert graph.survey(model) == before
