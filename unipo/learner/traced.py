"""A function of tensors as one compiled graph, made by watching it run once on real data.

Every tensor operation becomes a node. Where Python looked at a number (`if bool(x.all())`, `float(x)`) it has decided one way;
the graph computes these numbers again at every call, and where one comes out otherwise nothing is changed and the caller is
told: that call belongs to the function itself, the slow twin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from unipo.compilers import cpp_compiler, user_cache

Changes = Sequence[tuple[Tensor, Tensor]]
"""(a tensor that lives on, its new value)."""
READ = torch.ops.aten._local_scalar_dense.default
INDEX = torch.ops.aten.index.Tensor

OPTIONS = {"size_asserts": False, "cpp.use_decompose_tanh": True, "unroll_reductions_threshold": 3}
"""Of torch's compiler: tanh from an exponential (within 2e-7) makes a whole PPO update a quarter shorter; sums over a few action
dimensions written out would be computed one number at a time."""


class Unsuited(Exception):
    """The function cannot be made one graph here; the message says why."""


class NotNow(Exception):
    """What a function raises on data that it should not be traced on; other data may be better."""


@dataclass
class Graph:
    """`graph(inputs)` -> (decided as when it was traced?, outputs); where not, nothing was changed.

    `lasting`: tensors of the outside that it reads; `changed`: those that it changes; `read`: which of its inputs it reads.
    """

    run: Callable[..., Sequence[Tensor]]
    lasting: list[Tensor]
    changed: list[Tensor]
    read: list[bool]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[bool, Sequence[Tensor]]:
        with torch.no_grad():
            *outputs, agreed = self.run(*self.lasting, *inputs)
        return bool(agreed), outputs


def can_compile() -> str:
    """Empty where graphs can be compiled on this machine; else why not."""
    return "" if cpp_compiler() else "there is no C++ compiler"


def graph_of(
    function: Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], Changes]], inputs: Sequence[Tensor]
) -> Graph:
    """Trace and compile `function(inputs) -> (outputs, changes)`; what it reads besides its inputs is read anew at every call.

    It must not change anything in place but its own intermediate results: `changes` says what is to be changed. Raises
    Unsuited where a node cannot be made or compiled.
    """
    changed: list[Tensor] = []

    def whole(given: Sequence[Tensor]) -> list[Tensor]:
        outputs, changes = function(given)
        changed.extend(target for target, _ in changes)
        return [*outputs, *(value for _, value in changes)]

    try:
        traced = make_fx(whole, tracing_mode="real", _error_on_data_dependent_ops=False)(list(inputs))
        lasting = _guarded(traced, inputs, changed)
        run = inductor(traced, [x.detach() for x in (*lasting, *inputs)])
    except (NotNow, Unsuited):
        raise
    except Exception as error:
        raise Unsuited(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    read = [bool(node.users) for node in traced.graph.nodes if node.op == "placeholder"][len(lasting) :]
    return Graph(run, [x.detach() for x in lasting], [x.detach() for x in changed], read)


class _Decisions(fx.Interpreter):
    """Runs a graph, and notes the numbers that Python read from tensors."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.made: dict[fx.Node, float | int | bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(n.target, torch._ops.OpOverload) and torch.Tag.dynamic_output_shape in n.target.tags:
            indices = self.fetch_args_kwargs_from_env(n)[0][1] if n.target is INDEX else [None]
            if not all(isinstance(i, Tensor) and i.dtype == torch.int64 for i in indices):
                raise Unsuited(f"{n.target} gives as much as its data say")
        out = super().run_node(n)
        if n.target is READ:
            self.made[n] = out
        return out


def _guarded(traced: fx.GraphModule, inputs: Sequence[Tensor], changed: Sequence[Tensor]) -> list[Tensor]:
    """Rewrite the graph in place: tensors of the outside become inputs, decisions a last output, changes happen if all agree.

    Returns the tensors of the outside in the order of their inputs, which come first.
    """
    graph = traced.graph
    graph.set_codegen(fx.graph.CodeGen())
    decisions = _Decisions(traced)
    with torch.no_grad():
        decisions.run(*inputs)
    if any(isinstance(value, float) for value in decisions.made.values()):
        raise Unsuited("the code reads numbers from tensors, and not only decisions")
    lasting = _lifted(traced, changed)
    places = {id(t): node for t, node in lasting}
    (last,) = [node for node in graph.nodes if node.op == "output"]
    results = list(last.args[0])
    outputs, values = results[: len(results) - len(changed)], results[len(results) - len(changed) :]
    with graph.inserting_before(last):
        pairs = ((node.args[0], value) for node, value in decisions.made.items())
        same = [graph.call_function(torch.ops.aten.eq.Scalar, pair) for pair in pairs]
        same = [graph.call_function(torch.ops.aten.reshape.default, (node, [])) for node in same]
        true = graph.call_function(torch.ops.aten.ones.default, ([],), {"dtype": torch.bool})
        agreed = reduce(lambda a, b: graph.call_function(torch.ops.aten.logical_and.default, (a, b)), same, true)
        for target, value in zip(changed, values, strict=True):
            place = places[id(target)]
            kept = graph.call_function(torch.ops.aten.where.self, (agreed, value, place))
            graph.call_function(torch.ops.aten.copy_.default, (place, kept))
    last.args = ([*outputs, agreed],)
    for node in decisions.made:
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph.lint()
    traced.recompile()
    return [t for t, _ in lasting]


def _lifted(traced: fx.GraphModule, more: Sequence[Tensor]) -> list[tuple[Tensor, fx.Node]]:
    """Every tensor that the graph holds as an attribute becomes an input of it, once, before the others; `more` too."""
    graph = traced.graph
    found: dict[int, tuple[Tensor, fx.Node]] = {}
    first = next(iter(graph.nodes))

    def place(tensor: Tensor) -> fx.Node:
        if id(tensor) not in found:
            with graph.inserting_before(first):
                found[id(tensor)] = (tensor, graph.placeholder(f"lasting_{len(found)}"))
        return found[id(tensor)][1]

    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        tensor: Any = reduce(getattr, str(node.target).split("."), traced)
        node.replace_all_uses_with(place(tensor))
        graph.erase_node(node)
    for name in [*dict(traced.named_parameters(recurse=False)), *dict(traced.named_buffers(recurse=False))]:
        delattr(traced, name)  # or the compiler would pass them as inputs of their own
    for tensor in more:
        place(tensor)
    return list(found.values())


@torch.no_grad()
def inductor(traced: fx.GraphModule, example: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The graph as native code, from torch's cache where the same graph was compiled before.

    What is called is the innermost of the compiler's layers: the others are about gradients and aliases, of which there are none.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # slow to import
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "graphs"))
    made: list[Any] = []

    def inner(*arguments: Any, **keywords: Any) -> Any:
        made.append(compile_fx_inner(*arguments, **keywords))
        return made[-1]

    kept = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))  # without which nothing is kept for later runs
    with tracing(kept), torch._functorch.config.patch(enable_autograd_cache=False):
        compile_fx(traced, list(example), inner_compile=inner, config_patches=OPTIONS, ignore_shape_env=True)
    (code,) = made
    return lambda *inputs: code.current_callable(list(inputs))
