"""Which module calls which, and what becomes of the result: reads only, runs no code of the model.

`survey(model)` answers for every Linear: who calls it (its *owners*), how often, which activation
and which dropout follow, and whether a rewrite of the owners is provably the model that they are
(*rule P*); where it is not, why, in a sentence. `trace(owner)` gives a method of one owner as a
`torch.fx` graph, every child a leaf.

The graph is not recorded by running the body on proxies, as `torch.fx.Tracer.trace` does: that
patches `nn.Module` for the whole process (another thread's forward fails meanwhile), runs the
body's effects, decides `x is not None` once and for all, turns `y += 1` into `y = y + 1` and burns
every attribute and global in. Here the tracer walks the syntax tree, which is first proved to be
the code that runs (it is compiled again and compared with the function's bytecode), and emits one
node for one operation, in order of evaluation. Nothing has a value at that time, so nothing can be
burned in:
`self.scale`, `self.training` and globals are nodes that read them when they run, `y += 1` is a node
that adds in place.

The whitelist is what the tracer has a rule for. A statement or expression with control flow of its
own (`if`, `for`, `with`, `a if c else b`, a comprehension) becomes one opaque node, a *part*, which
runs the source as it stands; a child called in there is in doubt, the others are not. Whatever has
no rule (closures, lambdas, `yield`, imports) refuses the method. A child is also in doubt where it,
or a module that holds it, is handed to code that could call it unseen.
"""

from regwrap.graph.model import is_linear, survey
from regwrap.graph.names import MADE, spoken_by
from regwrap.graph.nodes import BINARY, UNARY, augment, build, call, part, read, unpack
from regwrap.graph.owner import Facts, facts, facts_about, method_of, trace
from regwrap.graph.questions import activation_after, calls_of, input_of, is_dropout
from regwrap.graph.tracer import Tracer
from regwrap.graph.verdicts import Activation, Call, Existing, Refused, Site, Verdict
from regwrap.graph.view import ABSENT, joined, look_up

__all__ = [
    "ABSENT",
    "BINARY",
    "MADE",
    "UNARY",
    "Activation",
    "Call",
    "Existing",
    "Facts",
    "Refused",
    "Site",
    "Tracer",
    "Verdict",
    "activation_after",
    "augment",
    "build",
    "call",
    "calls_of",
    "facts",
    "facts_about",
    "input_of",
    "is_dropout",
    "is_linear",
    "joined",
    "look_up",
    "method_of",
    "part",
    "read",
    "spoken_by",
    "survey",
    "trace",
    "unpack",
]
