"""The reader of a function's derivative, which evaluates it with feedback or only analyses it.

The program, `jax.make_jaxpr` of `jax.jvp`, computes a function and its tangents, equation by
equation. An equation without tangents belongs to the function and is not changed. In an equation
with tangents the other operands are coefficients, and `labels.tangent` finds which of them are
replaced by their form with feedback.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core, source_info_util

from soap_jax import ops, trees
from soap_jax.transform import labels as lb
from soap_jax.transform import nested
from soap_jax.transform import values as vals
from soap_jax.transform.values import Value


class Use(NamedTuple):
    """A place where a kernel is used.

    Attributes:
        primitive: the primitive's name.
        line: the file, line and function.
        operands: the operands' shapes and dtypes.
        problem: the reason why feedback cannot be used here, or "".
    """

    primitive: str
    line: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    problem: str = ""

    def __str__(self):
        """The place: "dot_general at model.py:12:4 (loss)"."""
        return f"{self.primitive} at {self.line}"


@dataclasses.dataclass
class Notes:
    """The reader's notes on one param.

    Attributes:
        first: the first place where it is used.
        last: the last place where it is used.
        met: places in the forward pass where it is in a product with an activation.
        served: places where its feedback multiplies an error.
        broken: places where broken weights of it would multiply an error.
        lost: the operations that broke it in the forward pass.
        numbers: places where a single number is computed from it, which is exact.
        used: the dtypes in which its feedback is used.
        layer: the place where a layer with feedback of its own uses it, if there is one.
        served_by_layer: whether that layer's feedback multiplies an error.
    """

    first: Use | None = None
    last: Use | None = None
    met: dict[Use, None] = dataclasses.field(default_factory=dict)
    served: dict[Use, None] = dataclasses.field(default_factory=dict)
    broken: dict[Use, None] = dataclasses.field(default_factory=dict)
    lost: dict[lb.Broken, None] = dataclasses.field(default_factory=dict)
    numbers: dict[Use, None] = dataclasses.field(default_factory=dict)
    used: frozenset[np.dtype] = frozenset()
    layer: Use | None = None
    served_by_layer: bool = False


class Product(NamedTuple):
    """A product of weights and another operand, whose tangents come next in the program."""

    eqn: core.JaxprEqn
    operands: Sequence[Value]
    kernel: int

    def has_tangent(self, eqn: core.JaxprEqn, labels: Sequence[lb.Label]) -> bool:
        """Whether the equation multiplies the weights' tangent by the product's activation."""
        k, name = self.kernel, eqn.primitive.name
        return (
            name == self.eqn.primitive.name
            and [label.tangent for label in labels] == [k == 0, k == 1]
            and eqn.params == self.eqn.params
            and eqn.invars[1 - k] is self.eqn.invars[1 - k]
            and (labels[1 - k].activation or (labels[1 - k].data and lb.kind(eqn) in lb.PRODUCTS))
        )


class Reader:
    """The reader of one program.

    Args:
        paths: the paths of the kernels, by number.
        abstract: whether to compute only labels.
        feedback_bar: as in `ops.feedback_op`.

    Attributes:
        notes: the notes by kernel, in order of first use.
        ways: the ways of the outputs that were read last; see `labels.Label`.
    """

    def __init__(
        self,
        paths: Sequence[trees.Path | None],
        *,
        abstract: bool = False,
        feedback_bar: ops.FeedbackBar = None,
    ):
        self.paths = paths
        self.abstract = abstract
        self.local_bar: Any = feedback_bar if callable(feedback_bar) else None
        self.notes: dict[int, Notes] = {}
        self.ways: frozenset[tuple[int, bool]] = frozenset()
        self.backward: dict[int, tuple[core.JaxprEqn, core.ClosedJaxpr]] = {}  # of custom_vjp
        self.quiet = False
        self.product: Product | None = None  # the last product
        self.line = "an unknown line"  # the line of the equation whose jaxpr is being read

    def note(self, leaf: int) -> Notes:
        """Returns the notes on a kernel."""
        return self.notes.setdefault(leaf, Notes())

    @contextlib.contextmanager
    def only_labels(self, quiet: bool = True):
        """A context that computes only labels, and takes no notes if `quiet`."""
        before = self.abstract, self.quiet
        self.abstract, self.quiet = True, quiet or self.quiet
        try:
            yield
        finally:
            self.abstract, self.quiet = before

    def labels(self, closed: core.ClosedJaxpr, labels: Sequence[lb.Label]) -> list[lb.Label]:
        """Computes the labels of a jaxpr's outputs."""
        with self.only_labels(quiet=False):
            return [value.label for value in self.run(closed, list(map(Value, labels)))]

    def run(self, closed: core.ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
        """Reads a jaxpr; returns the values of its outputs."""
        jaxpr = closed.jaxpr
        consts = [vals.constant(const) for const in closed.consts]
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
        outer, self.product = self.product, None

        def read(atom):
            return vals.constant(atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if self.abstract:
                outs = self.equation(eqn, operands)
            else:
                names = source_info_util.current_name_stack() + eqn.source_info.name_stack
                with (
                    source_info_util.user_context(eqn.source_info.traceback, name_stack=names),
                    eqn.ctx.manager,
                ):
                    outs = self.equation(eqn, operands)
            env.update(zip(eqn.outvars, outs, strict=True))
            if eqn.primitive.name in (*lb.PRODUCTS, *lb.ELEMENTWISE):
                kernels = [k for k, value in enumerate(operands) if value.label.kernels]
                if len(kernels) == 1 and not any(value.label.tangent for value in operands):
                    self.product = Product(eqn, operands, kernels[0])
        self.product = outer
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, values: list[Value]) -> list[Value]:
        """Reads one equation; returns the values of its outputs."""
        name = eqn.primitive.name
        labels = [value.label for value in values]
        if not self.quiet and name not in nested.NESTED:
            for i in lb.merged(labels):
                note, use = self.note(i), self._use(eqn)
                note.first, note.last = note.first or use, use
        if name in nested.NESTED:
            outer, self.line = self.line, self.line_of(eqn)
            try:
                return nested.read(self, eqn, values)
            finally:
                self.line = outer
        if name in _EACH and len(values) == len(eqn.outvars):
            return self._bind(eqn, values, labels, frozenset())
        if any(hasattr(var.aval, "inner_aval") for var in eqn.invars):
            self._refuse_refs(eqn, labels)
        if any(label.tangent for label in labels):
            return self._tangent(eqn, values, labels)
        if not any(label.kernels for label in labels):
            out = lb.computed(eqn, labels)
            outs = [lb.plain(eqn, out, labels, var) for var in eqn.outvars]
            return self._bind(eqn, values, outs, None)
        outs, notes = lb.primal(eqn, labels, self.line_of(eqn))
        if not self.quiet:
            for found in notes:
                kind = "met" if isinstance(found, lb.Met) else "numbers"
                getattr(self.note(found.leaf), kind)[self._use(eqn)] = None
            for leaf, status in lb.merged(outs).items():
                if isinstance(status, lb.Broken):
                    self.note(leaf).lost[status] = None
                if outs[0].layer:
                    self.note(leaf).layer = self._use(eqn)
            self._note_used(eqn, labels, [n.leaf for n in notes if isinstance(n, lb.Met)])
        return self._bind(eqn, values, outs, frozenset())

    def _tangent(self, eqn, values, labels):
        """Reads an equation with tangents."""
        inner = [v for v in eqn.params.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        step = lb.tangent(eqn, labels, self.line_of(eqn))
        if inner and eqn.primitive.name not in _LINEAR:  # it may contain a part of the function
            problem = lb.Broken("whose body is not read", *self._place(eqn))
            step = step._replace(broken=dict.fromkeys(lb.merged(labels), problem))
        product = self.product if self.product and self.product.has_tangent(eqn, labels) else None
        if product:  # weights times data, though the data may get no error
            weights = product.operands[product.kernel].label
            broken = {i: s for i, s in weights.kernels.items() if isinstance(s, lb.Broken)}
            step = step._replace(broken={**broken, **step.broken})
        label = step.label
        if self.local_bar and label.kernels and any(v.kernels for v in labels if not v.tangent):
            problem = lb.Broken(
                "where feedback_bar is a function of one product", *self._place(eqn)
            )
            label = label._replace(kernels=dict.fromkeys(label.kernels, problem))
        if step.broken:
            refused = self.refuse(eqn, step)  # which also takes notes
            label = label._replace(refused=label.refused or refused)
        if not self.quiet:
            for i in step.served:
                self.note(i).served[self._use(eqn)] = None
            self._note_used(eqn, labels, step.served)
        if step.decided:
            exact = [
                k in step.exact or (self.local_bar and v.tangent) for k, v in enumerate(labels)
            ]
            chosen = [
                Value(v.label, v.array if is_exact else v.with_feedback)
                for v, is_exact in zip(values, exact, strict=True)
            ]
            outs = self._bind(eqn, chosen, [label] * len(eqn.outvars), None)
            if product and self.local_bar and not self.abstract:
                outs = self._learning(product, values, outs)
            return outs
        return self._bind(eqn, values, [label] * len(eqn.outvars), step.exact)

    def refuse(self, eqn: core.JaxprEqn, step: lb.Step) -> str:
        """Notes broken weights that would multiply an error; returns the error message."""
        use = self._use(eqn)
        for i, broken in step.broken.items():
            problem = self.told(broken)
            if (broken.primitive, broken.line) != (use.primitive, use.line):
                problem = f"after {broken}, {problem}"
            if not self.quiet:
                self.note(i).broken[use._replace(problem=problem)] = None
        paths = " and ".join(map(self.show, step.broken))
        return (
            f"an error would be sent back through the kernel at {paths} itself, not through its "
            f"feedback: in {use}, {problem}. Feedback can replace a kernel only if nothing but its "
            "layout is changed before its product with an activation. Give the kernel no feedback "
            "(None at its path), which is exact backpropagation; or stop the gradient "
            "(jax.lax.stop_gradient). Pass a mask computed from weights, or a batch that the "
            "function closes over, as an argument."
        )

    def _bind(self, eqn, values, labels, exact: frozenset[int] | None):
        """Evaluates an equation; also with feedback in all operands but `exact`, if not None."""
        if self.abstract:
            return list(map(Value, labels))
        arrays = vals.bind(eqn, [value.array for value in values])
        beside = [None] * len(arrays)
        if exact is not None and any(label.two_forms for label in labels):
            forms = [v.array if k in exact else v.with_feedback for k, v in enumerate(values)]
            found = vals.bind_wide(eqn, forms)
            beside = [t if lab.two_forms else None for t, lab in zip(found, labels, strict=True)]
        return list(map(Value, labels, arrays, beside))

    def _refuse_refs(self, eqn, labels):
        """Raises ValueError if kernels or errors are in a mutable array, which has no labels."""
        if any(label.kernels or label.tangent for label in labels):
            raise ValueError(
                f"{self._use(eqn)} reads or writes a mutable array (jax.Ref) with a kernel that "
                "has feedback, or with an error; expected a function without mutable arrays."
            )

    def _learning(self, product, values, outs):
        """Gives feedback the cotangent that the function `feedback_bar` returns for a product."""
        eqn, k = product.eqn, product.kernel
        feedback_dot = values[k].feedback
        if feedback_dot is None or eqn.primitive.name not in lb.PRODUCTS:
            return outs
        x, kernel = product.operands[1 - k], product.operands[k]

        def op(x, kernel):
            return vals.bind(eqn, [x, kernel] if k else [kernel, x])[0]

        def bar(residuals, y_bar):
            x, kernel, feedback = residuals
            return self.local_bar(op, x, kernel, feedback, y_bar).astype(feedback.dtype)

        residuals = x.array, kernel.array, kernel.feedback
        (out,) = outs
        (more,) = vals.linear(
            lambda residuals, y_bars: [bar(residuals, *y_bars)],
            residuals,
            [feedback_dot],
            [jax.typeof(out.array)],
        )
        return [out._replace(array=out.array + more)]

    def show(self, leaf: int) -> str:
        """Formats a param's path for messages."""
        return trees.show(self.paths[leaf] or ())

    def told(self, broken: lb.Broken) -> str:
        """Describes the problem, with the names of the params that were mixed in."""
        names = ", ".join(self.show(i) for i in sorted(broken.others))
        return broken.problem + (f" ({names})" if names else "")

    def _note_used(self, eqn, labels, leaves):
        for i in leaves:
            mine = [label if i in label.kernels else lb.Label() for label in labels]
            self.note(i).used |= lb.used(eqn, mine)

    def _use(self, eqn) -> Use:
        operands = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
        return Use(eqn.primitive.name, self.line_of(eqn), operands)

    def _place(self, eqn) -> tuple[str, str]:
        return eqn.primitive.name, self.line_of(eqn)

    def line_of(self, eqn: core.JaxprEqn) -> str:
        """The line of an equation, or of the enclosing one if it comes from JAX's cache."""
        return source_info_util.summarize(eqn.source_info) or self.line


_EACH = ("optimization_barrier", "psum", "psum_invariant", "device_put", "pvary", "all_gather")
"""Primitives that are applied to each of their operands separately."""

_LINEAR = ("custom_linear_solve",)
"""Primitives with jaxprs that are linear in all operands with tangents."""
