"""The private parts of torch that Cutlayer uses, each with the reason; nothing else imports one.

Written for torch 2.13, which ``pyproject.toml`` pins. ``tests/export/test_internals.py`` compares
every name with the signature that it had there, so an upgrade begins with what that test says.

A hub imports this module, so what pulls in torch's compilers is imported by the functions that need
it. The private parts of the ONNX exporter are in :mod:`export.lowering.onnx_internals`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Classes of modules. The public classes are their subclasses, and so are those of models; a tuple
# of the public ones would miss the latter.

NormBase = _NormBase
"""Base of batch and instance norms: a norm that may have running statistics."""

BatchNormBase = _BatchNorm
"""Base of batch norms."""

ConvolutionBase = _ConvNd
"""Base of convolutions, transposed or not."""

TransposedConvolutionBase = _ConvTransposeNd
"""Base of transposed convolutions."""

DropoutBase = _DropoutNd
"""Base of dropouts."""

SpectralNormBase = _SpectralNorm
"""Parametrization of ``torch.nn.utils.parametrizations.spectral_norm``."""


def forward_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """Hooks before and after the forward pass of a module, by number; deleting one removes it.

    Publicly, only the handle removes a hook, and a copy of a module has copies of the hooks
    without handles.
    """
    return [module._forward_hooks, module._forward_pre_hooks]


# Operations on lists of tensors, which torch.optim uses. Publicly there is one call for each
# tensor: for 100 matrices of 32 x 32, an update of AdamW then takes 5.7 ms in place of 2.4.

foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_sqrt = torch._foreach_sqrt
foreach_addcmul_ = torch._foreach_addcmul_
foreach_addcdiv_ = torch._foreach_addcdiv_
foreach_norm = torch._foreach_norm


@contextmanager
def without_onednn() -> Iterator[None]:
    """Disable oneDNN, so that an LSTM is traced as matrix products: its kernel has no translation.

    ``torch.backends.mkldnn.flags`` would do the same, but warns about settings of GPUs.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class ShapesOnly:
    """While active, tensors have shapes and dtypes, but no data.

    There is no public way to run a module without data whose own tensors have some: the device
    ``meta`` refuses to mix both.
    """

    LOGGER = "torch._subclasses.fake_tensor"
    """Name of the logger of the errors of operations."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> ShapesOnly:
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor without data of the same shape and dtype."""
        return self._mode.from_tensor(tensor)


# Tracing. torch.export.export cannot trace a step: in its strict mode it refuses autograd.grad, and
# otherwise it finds tensors without data among the constants of the result, and fails.


class SymbolicSizes:
    """Dimensions whose size stays a symbol during tracing.

    Args:
        hints: a size for each dimension, by its name. torch decides with it what it cannot decide
            for all sizes; 1 and 2 would make the size a constant in some places.
        largest: the largest size of dimensions that have one; the smallest is 1.
        shapes: environment of the symbols; None for torch's own.

    Attributes:
        sizes: the sizes, for shapes of tensors.
    """

    def __init__(
        self,
        hints: Mapping[str, int],
        largest: Mapping[str, int] = MappingProxyType({}),
        shapes: Any = None,
    ) -> None:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        self._largest = largest
        self._shapes = ShapeEnv() if shapes is None else shapes
        self._symbols = {
            name: self._shapes.create_symbol(
                hint,
                source=ConstantSource(name),
                dynamic_dim=DimDynamic.DYNAMIC,
                constraint_dim=None,
            )
            for name, hint in hints.items()
        }
        # torch starts at 2, and would answer a question about a size of 1 without being asked
        self.bound()
        self.sizes: dict[str, int | torch.SymInt] = {
            name: self._shapes.create_symintnode(symbol, hint=hints[name])
            for name, symbol in self._symbols.items()
        }

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """A context in which :func:`trace_graph` traces without data, for all sizes at once."""
        mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        with remembered_sizes(self._shapes), _without_metadata(), _dispatching(mode):
            yield

    @property
    def names(self) -> dict[Any, str]:
        """Names of the dimensions by their symbol."""
        return {symbol: name for name, symbol in self._symbols.items()}

    def fixed(self) -> list[str]:
        """Names of the dimensions to which the traced code gave a number or another dimension."""
        return [name for name, s in self._symbols.items() if s in self._shapes.replacements]

    def bound(self) -> dict[Any, Any]:
        """Bound each size again, which tracing may have narrowed; return the bounds.

        ExecuTorch plans memory by them.
        """
        from torch.utils._sympy.value_ranges import ValueRanges

        limits = {self._symbols[n]: ValueRanges(1, most) for n, most in self._largest.items()}
        self._shapes.var_to_range.update(limits)
        return limits


_ARITHMETIC = (
    "add", "sub", "mul", "int_floordiv", "eq", "ne", "lt", "le", "gt", "ge", "sym_max",
)  # fmt: skip
"""Operations of two sizes whose result depends on their expressions alone."""


@contextmanager
def remembered_sizes(shapes: Any) -> Iterator[None]:
    """Let arithmetic with the sizes of an environment be done once.

    torch asks for the layout of every tensor anew, which is 50 times the same arithmetic, in a
    third of the time of a trace. Each answer is an object of its own, as without this: by these
    objects, torch knows which sizes a graph computes. Arithmetic that a graph computes itself is
    left to torch.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.fx.experimental.sym_node import SymNode

    known: dict[Any, Any] = {}
    numbers: dict[Any, int | None] = {}

    def remembering(name: str, compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def computed(self: Any, other: Any) -> Any:
            if self.shape_env is not shapes or get_proxy_mode() is not None:
                return compute(self, other)
            key = name, *_size(self), *_size(other)
            found = known.get(key)
            if found is None:
                found = known[key] = compute(self, other)
            alike = SymNode.__new__(SymNode)
            alike.__dict__.update(found.__dict__)  # copy.copy takes ten times as long
            return alike

        return computed

    def as_int(self: Any) -> int | None:
        expression = self.expr
        if expression not in numbers:
            numbers[expression] = original_as_int(self)
        return numbers[expression]

    original_as_int = SymNode.maybe_as_int
    originals = {name: getattr(SymNode, name) for name in _ARITHMETIC}
    replaced: dict[str, Any] = {
        name: remembering(name, compute) for name, compute in originals.items()
    }
    with patch.multiple(SymNode, **replaced, maybe_as_int=as_int):
        yield


def _size(node: Any) -> tuple[Any, ...]:
    """What the result of an operation on a size depends on."""
    return node.expr, node.pytype, node.hint, node._optimized_summation


@contextmanager
def _without_metadata() -> Iterator[None]:
    """Leave out the second description of each result, which nothing reads: ``val`` has it all."""
    with patch("torch.fx.experimental.proxy_tensor._extract_tensor_metadata", lambda value: None):
        yield


@contextmanager
def without_collections() -> Iterator[None]:
    """Put garbage collections off: a trace makes millions of objects, and most of them last."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def always_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for every size, so that a graph does not depend on one."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


@contextmanager
def _dispatching(mode: FakeTensorMode) -> Iterator[None]:
    """Run on shapes, and in Python where torch can: only there do sizes stay symbols."""
    from torch._dispatch.python import enable_python_dispatcher

    with ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(enable_python_dispatcher())
        yield


def trace_graph(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """Trace a function of tensors, and gradients that it computes, as a graph of operators.

    Args:
        function: the function.
        inputs: its inputs.
        decompositions: functions that replace operators, by operator.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    table = dict(decompositions) if decompositions else None
    return make_fx(function, decomposition_table=table)(*inputs)


class GraphShapes:
    """The shapes of a traced graph, with which functions can be traced into that graph.

    Args:
        graph: a graph that was traced with :meth:`SymbolicSizes.tracing`.
    """

    def __init__(self, graph: fx.Graph) -> None:
        from torch._guards import detect_fake_mode

        mode = detect_fake_mode([node.meta.get("val") for node in graph.nodes])
        assert isinstance(mode, FakeTensorMode)
        self._mode = mode

    def trace(self, function: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
        """Trace a function of values of the graph before dispatch.

        ``linear`` and ``reshape`` are still operators there.
        """
        from torch.fx.experimental.proxy_tensor import make_fx

        with _dispatching(self._mode), torch.no_grad():
            return make_fx(function, pre_dispatch=True)(*values)


def without_repetition(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph in which every operation is computed once."""
    from torch._functorch.compile_utils import fx_graph_cse

    return fx_graph_cse(graph)


OperatorMode = TorchDispatchMode
"""Base of modes that replace operators. The public ``TorchFunctionMode`` replaces functions, and
sees none of the operators that autograd runs."""


def schema(operator: Any) -> torch.FunctionSchema:
    """The arguments and results of an operator, and which of them share memory."""
    found: torch.FunctionSchema = operator._schema
    return found


def is_operator(target: object) -> bool:
    """Whether the target of a node is an operator of torch."""
    return isinstance(target, torch._ops.OpOverload)


def operators(graph: fx.Graph) -> Iterator[Any]:
    """The operators of a graph."""
    for node in graph.nodes:
        if is_operator(node.target):
            yield node.target


def mutates(node: fx.Node) -> bool:
    """Whether a node is an operator that changes one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and schema(node.target).is_mutable


def flatten(values: Any) -> tuple[list[Any], Any]:
    """The leaves of nested tuples, lists and dictionaries, and their layout."""
    return _pytree.tree_flatten(values)


def map_leaves(function: Callable[[Any], Any], values: Any) -> Any:
    """The same layout, with the results of a function in place of the leaves."""
    return _pytree.tree_map(function, values)


def unflatten(leaves: Sequence[Any], layout: Any) -> Any:
    """The inverse of :func:`flatten`."""
    return _pytree.tree_unflatten(list(leaves), layout)


# Programs. torch.export.export would trace the graph again, which takes as long as the first trace.


def make_program(
    module: fx.GraphModule,
    inputs: Sequence[InputSpec],
    outputs: Sequence[OutputSpec],
    buffers: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    limits: Mapping[Any, Any],
) -> ExportedProgram:
    """Wrap a graph as an ``ExportedProgram``, whose constructor is not for users.

    Args:
        module: the graph.
        inputs: specification of each placeholder, in their order.
        outputs: specification of each result, in their order.
        buffers: buffers by target of their input.
        constants: lifted constants by target of their input.
        limits: bounds of symbolic sizes, see :meth:`SymbolicSizes.bound`.
    """
    given = tuple(range(len(inputs) - len(buffers) - len(constants)))
    signature = ModuleCallSignature(
        [], [], _pytree.tree_structure((given, {})), _pytree.tree_structure(tuple(outputs))
    )
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature(list(inputs), list(outputs)),
        state_dict=dict(buffers),
        range_constraints=dict(limits),
        module_call_graph=[ModuleCallEntry("", signature)],
        constants=dict(constants),
    )


def with_graph(
    program: ExportedProgram, module: fx.GraphModule, signature: ExportGraphSignature
) -> ExportedProgram:
    """A program with another graph and the same constants."""
    return program._update(module, signature)
