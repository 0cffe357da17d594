"""The reader of a function's derivative: it evaluates it with feedback, or only says what is there.

The program that it reads computes a function and its tangents, equation by equation, as
`jax.make_jaxpr` of `jax.jvp` writes it. An equation without tangents is the function's own and
stays as it is. In one with tangents, the other operands are coefficients, and `labels.tangent` says
which of them are taken in the form of their feedback.
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
        line: file, line and function.
        operands: the operands' shapes and dtypes.
        problem: why no feedback can serve here; empty where it does.
        mixed: whether data are mixed into what is used here: it may be meant as an activation.
    """

    primitive: str
    line: str
    operands: tuple[jax.ShapeDtypeStruct, ...]
    problem: str = ""
    mixed: bool = False

    def __str__(self):
        """The place: "dot_general at model.py:12:4 (loss)"."""
        return f"{self.primitive} at {self.line}"


@dataclasses.dataclass
class Notes:
    """What was found of one param.

    Attributes:
        first: the first place where it is used.
        last: the last one.
        met: places where it meets an activation, forwards.
        served: places where an error passes its feedback.
        broken: places where an error would pass what has no feedback.
        lost: what broke it, forwards.
        numbers: places where a single number is made of it, which is exact.
        used: the dtypes in which its feedback is used.
        layer: whether it belongs to a layer with feedback of its own.
        served_by_layer: whether an error passes that layer's feedback.
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
    """A product of weights and something else, whose tangents come next in the program."""

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
    """Reads one program.

    Args:
        paths: the paths of the kernels, by number.
        abstract: whether nothing is to be computed.
        feedback_bar: as in `ops.feedback_op`.

    Attributes:
        notes: what was found, by kernel, in order of first use.
        ways: how errors come back to params from what was read last, see `labels.Label`.
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
        self.product: Product | None = None  # the last one
        self.line = "an unknown line"  # of the equation whose jaxpr is being read

    def note(self, leaf: int) -> Notes:
        """The notes on a kernel."""
        return self.notes.setdefault(leaf, Notes())

    @contextlib.contextmanager
    def only_labels(self, quiet: bool = True):
        """Computes nothing, and takes no notes if quiet."""
        before = self.abstract, self.quiet
        self.abstract, self.quiet = True, quiet or self.quiet
        try:
            yield
        finally:
            self.abstract, self.quiet = before

    def labels(self, closed: core.ClosedJaxpr, labels: Sequence[lb.Label]) -> list[lb.Label]:
        """The labels of a jaxpr's outputs."""
        with self.only_labels(quiet=False):
            return [value.label for value in self.run(closed, list(map(Value, labels)))]

    def run(self, closed: core.ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
        """Reads a jaxpr."""
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
        """Reads one equation."""
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
        """An equation with tangents; those without a form with feedback have one form."""
        inner = [v for v in eqn.params.values() if hasattr(v, "jaxpr") or hasattr(v, "eqns")]
        step = lb.tangent(eqn, labels, self.line_of(eqn))
        if inner and eqn.primitive.name not in _LINEAR:  # it may hold a part of the function itself
            problem = lb.Broken("whose body is not read", *self._place(eqn))
            step = step._replace(broken=dict.fromkeys(lb.merged(labels), problem))
        product = self.product if self.product and self.product.has_tangent(eqn, labels) else None
        if product:  # weights that meet data, though no error may come to these
            weights = product.operands[product.kernel].label
            broken = {i: s for i, s in weights.kernels.items() if isinstance(s, lb.Broken)}
            mixed = frozenset(broken) if weights.data else frozenset()
            step = step._replace(broken={**broken, **step.broken}, mixed=step.mixed | mixed)
        label = step.label
        if self.local_bar and label.kernels and any(v.kernels for v in labels if not v.tangent):
            problem = lb.Broken(
                "where feedback_bar is a function of one product", *self._place(eqn)
            )
            label = label._replace(kernels=dict.fromkeys(label.kernels, problem))
        if step.broken:
            label = label._replace(refused=label.refused or self.refuse(eqn, step))
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
        """Takes note of weights that an error would pass, and says so."""
        use = self._use(eqn)
        for i, broken in step.broken.items():
            problem = self.told(broken)
            if (broken.primitive, broken.line) != (use.primitive, use.line):
                problem = f"after {broken}, {problem}"
            if not self.quiet:
                found = use._replace(problem=problem, mixed=i in step.mixed)
                self.note(i).broken[found] = None
        paths = " and ".join(map(self.show, step.broken))
        return (
            f"an error would be sent back through the kernel at {paths} itself, not through its "
            f"feedback: in {use}, {problem}. Feedback replaces a kernel of which only the layout "
            "was changed before it meets an activation. Give the kernel no feedback (None at its "
            "path), which is exact backpropagation; or stop the gradient (jax.lax.stop_gradient). "
            "A mask made of weights, or a batch that the function closes over, is best passed as "
            "an argument."
        )

    def _bind(self, eqn, values, labels, exact: frozenset[int] | None):
        """Evaluates an equation; in both forms, if `exact` says which operands stay themselves."""
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
        """What is written to a mutable array cannot be followed."""
        if any(label.kernels or label.tangent for label in labels):
            raise ValueError(
                f"{self._use(eqn)} reads or writes a mutable array (jax.Ref) that a kernel with "
                "feedback or an error passes; expected a function without such arrays."
            )

    def _learning(self, product, values, outs):
        """Gives feedback the cotangent that a function of one product's operands returns."""
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
        """A param's path as error messages print it."""
        return trees.show(self.paths[leaf] or ())

    def told(self, broken: lb.Broken) -> str:
        """The problem, with the names of the params that were mixed in."""
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
        """A function that JAX traced before and took from its cache has no line of its own."""
        return source_info_util.summarize(eqn.source_info) or self.line


_EACH = ("optimization_barrier", "psum", "psum_invariant", "device_put", "pvary", "all_gather")
"""Primitives that do the same to each of their operands."""

_LINEAR = ("custom_linear_solve",)
"""Primitives with jaxprs in them that are linear where tangents enter."""
