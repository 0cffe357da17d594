"""The walk over a function's equations that `soap_jax.transform` describes.

What is known of a value is in `soap_jax.twins`; equations that hold jaxprs, in `soap_jax.bodies`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from soap_jax import bodies, ops, trees
from soap_jax import twins as tw

PRODUCTS = ("dot_general", "conv_general_dilated")
"""Bilinear primitives: a kernel with a twin goes through feedback here."""

LAYOUTS = (
    *("all_gather", "all_gather_invariant", "all_to_all", "broadcast_in_dim", "conj"),
    *("convert_element_type", "copy", "device_put", "dynamic_slice", "name", "neg"),
    *("optimization_barrier", "ppermute", "pvary", "reduce_precision", "reshape", "reshard"),
    *("rev", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "tile"),
    *("transpose", "unstack"),
)
"""Primitives that lay out a kernel anew; their other operands are indices."""

COMPUTING = ("conj", "neg", "reduce_precision")
"""Those of them that compute, for which a twin in fewer bits than its kernel is cast."""

JOINS = ("concatenate", "dynamic_update_slice", "pad", "scatter", "select_n", "stack")
"""Primitives that lay out several values together; one without a twin stands for itself."""

SUMS = ("add", "add_any", "sub")
"""Primitives that send each operand's cotangent back whatever the other operand is."""


Watch = Callable[[jax.Array, tw.Use], jax.Array]
"""`(x, use) -> x`: sees each operand that a kernel meets, and may observe its cotangent."""


class Walk:
    """One evaluation of a function with feedback; see `soap_jax.transform`.

    Args:
        watch: sees the operands that kernels meet.
        lookup: take all kernels for lookups, for a first look at a function.
        feedback_bar: as in `ops.feedback_op`.

    Attributes:
        uses: the places where kernels were used or lost.
        activations: where a lookup was first taken for an activation, by path.
    """

    def __init__(self, watch: Watch, *, lookup: bool = False, feedback_bar: ops.FeedbackBar = None):
        self.watch = watch
        self.lookup = lookup
        self.feedback_bar = feedback_bar
        self.uses: list[tw.Use] = []
        self.activations: dict[trees.Path, tw.Use] = {}
        self.line = "an unknown line"  # of the equation whose jaxpr is being evaluated

    def __call__(self, fun, params, twins: Mapping[trees.Path, Any], *args, **kwargs):
        """Evaluates `fun(params, *args, **kwargs)`; `twins` is feedback by its kernel's path."""
        _refuse_modules(params, *args, *kwargs.values())
        keyed, tree = jax.tree_util.tree_flatten_with_path((params, args, kwargs))
        arrays = {i: leaf for i, (_, leaf) in enumerate(keyed) if isinstance(leaf, _ARRAYS)}
        out_tree, out_static = None, []  # what `flat` returns besides arrays

        def flat(arrays):
            nonlocal out_tree, out_static
            leaves = [arrays.get(i, leaf) for i, (_, leaf) in enumerate(keyed)]
            params, args, kwargs = jax.tree.unflatten(tree, leaves)
            out, out_tree = jax.tree.flatten(fun(params, *args, **kwargs))
            is_array = [isinstance(x, _ARRAYS) for x in out]
            out_static = [None if yes else (x,) for yes, x in zip(is_array, out, strict=True)]
            return [x for yes, x in zip(is_array, out, strict=True) if yes]

        closed = jax.make_jaxpr(flat)(arrays)
        outs = iter(self.run(closed, [self._start(*keyed[i], twins) for i in arrays]))
        leaves = [next(outs).array if static is None else static[0] for static in out_static]
        return jax.tree.unflatten(out_tree, leaves)

    def _start(self, keys, leaf, twins) -> tw.Value:
        """What is known of a leaf of `(params, args, kwargs)`."""
        if keys[0].idx > 0:
            return tw.Value(leaf, data=True)
        path = trees.path_of(keys[1:])
        if path not in twins:
            return tw.Value(leaf, params=True)
        twin = _vary_like(jnp.asarray(twins[path]), leaf)
        # Fewer bits are cast where they are used: a scan would save a stack in the kernel's dtype.
        if self.feedback_bar or jnp.promote_types(twin.dtype, leaf.dtype) != leaf.dtype:
            twin = twin.astype(leaf.dtype)
        if not self.feedback_bar:
            twin = ops.detach(twin)
        return tw.Value(
            leaf, twin, tw.Kernel((path,), lookup="rows" if self.lookup else ""), params=True
        )

    def run(self, closed: core.ClosedJaxpr, args: Sequence[tw.Value]) -> list[tw.Value]:
        """Evaluates a jaxpr."""
        jaxpr = closed.jaxpr
        consts = [
            tw.Value(const, data=isinstance(const, jax.core.Tracer)) for const in closed.consts
        ]
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom):
            return tw.Value(atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            names = source_info_util.current_name_stack() + eqn.source_info.name_stack
            traceback = eqn.source_info.traceback
            with source_info_util.user_context(traceback, name_stack=names), eqn.ctx.manager:
                outs = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, values: list[tw.Value]) -> list[tw.Value]:
        """Evaluates one equation."""
        name = eqn.primitive.name
        if all(value.kernel is None for value in values):
            return tw.outputs(eqn, values)
        if name in bodies.BODIES:
            outer, self.line = self.line, self._line_of(eqn)
            try:
                return bodies.BODIES[name](self, eqn, values)
            finally:
                self.line = outer
        if name == "custom_vjp_call" and ops.SCOPE in str(eqn.source_info.name_stack):
            return self._own_feedback(eqn, values)
        if name in PRODUCTS or (name in _CUSTOM and not self.feedback_bar and _bilinear(eqn)):
            return self._product(eqn, values)
        if name not in LAYOUTS or name in COMPUTING:
            values = [value.widened for value in values]
        if name == "gather" or (name == "dynamic_slice" and any(v.data for v in values[1:])):
            return self._lookup(eqn, values)
        if name in LAYOUTS or name in JOINS:
            return self._layout(eqn, values)
        if name in ("mul", "div"):
            return self._scale(eqn, values)
        return self.lose(eqn, values)

    def _product(self, eqn, values):
        """A kernel meets an activation: through feedback."""
        for i in (1, 0):
            kernel, other = values[i], values[1 - i]
            is_input = other.data or other.constant or self.lookup
            meant = kernel.held or (is_input and not other.kernel)
            if kernel.twin is not None and meant and not other.held:
                break
        else:
            return self.lose(eqn, values)

        def op(x, kernel):
            return tw.bind(eqn, [x, kernel] if i else [kernel, x])

        use = self.used(eqn, values, kernel.kernel.paths)
        x = self.watch(other.array, use)
        if eqn.primitive.name in _CUSTOM:
            y = _through_own_rule(op, x, kernel.array, kernel.widened.twin)
        else:
            feedback_bar = self.feedback_bar
            y = ops.through_feedback(op, x, kernel.array, kernel.twin, feedback_bar=feedback_bar)
        (out,) = tw.derived([y], values)
        product = tw.Kernel(kernel.kernel.paths, lookup="product")
        if other.constant:  # data that `fun` closes over, or a fixed matrix: one cannot tell
            return [out._replace(twin=op(other.array, kernel.widened.twin), kernel=product)]
        if not other.data and not other.kernel and kernel.held:  # a learned input, or a factor
            lost = use._replace(problem="where a param without feedback is multiplied to it")
            return [out._replace(kernel=product._replace(lost=lost))]
        return [out]

    def _own_feedback(self, eqn, values):
        """The end of `ops.through_feedback`, in a layer of ours."""
        y, x, kernel, feedback = values
        use = self.describe(eqn, [x, kernel], tw.paths([kernel]))
        use = use._replace(primitive=ops.SCOPE)
        self.uses.append(use)
        values = [y, x._replace(array=self.watch(x.array, use)), kernel, feedback]
        return tw.outputs(eqn, values)

    def _layout(self, eqn, values):
        """The same op on kernels and on twins; an operand without a twin stands for itself."""
        kernels = [value for value in values if value.kernel]
        held = any(value.held for value in kernels)
        mixed = any(not v.kernel and not v.constant and tw.is_float(v) for v in values)
        if any(value.twin is None for value in kernels) or (mixed and not held):
            return self.lose(eqn, values)
        outs = tw.outputs(eqn, values)
        if not all(map(tw.is_float, outs)):  # cast to integers
            return self.lose(eqn, values)
        twins = tw.as_list(tw.bind(eqn, _twins(values)))
        if len(outs) == len(values):  # one operand, or several, each for itself
            known = [value.kernel and value.kernel._replace(slot=None) for value in values]
        else:
            either = (value.kernel for value in kernels if value.held or not held)
            known = [tw.Kernel(tw.paths(kernels), lookup=next(either).lookup)] * len(outs)
        return [
            out._replace(twin=twin, kernel=kernel) if kernel else out
            for out, twin, kernel in zip(outs, twins, known, strict=True)
        ]

    def _lookup(self, eqn, values):
        """Rows are looked up by index."""
        (out,) = tw.outputs(eqn, values)
        table, indices = values[0], [value.array for value in values[1:]]
        use = self.describe(eqn, values, table.kernel.paths, "a lookup, which is exact")
        if table.held:
            self.uses.append(use)
        for path in table.kernel.paths:
            self.activations.setdefault(path, use)
        twin = None if table.twin is None else tw.bind(eqn, [table.twin, *indices])
        return [out._replace(twin=twin, kernel=table.kernel._replace(lookup="rows", slot=None))]

    def _scale(self, eqn, values):
        """A kernel is scaled by what is not differentiated, such as a mask: so is its twin."""
        a, b = values
        kernel, factor = (b, a) if b.kernel and eqn.primitive.name == "mul" else (a, b)
        if kernel.twin is None or factor.kernel or not (kernel.held or factor.constant):
            return self.lose(eqn, values)
        if not factor.constant:
            use = self.used(eqn, values, kernel.kernel.paths, _NO_PRODUCT)
            factor = factor._replace(array=self.watch(factor.array, use))
        values = [kernel, factor] if kernel is a else [factor, kernel]
        (out,) = tw.outputs(eqn, values)
        twin = tw.bind(eqn, _twins(values))
        return [out._replace(twin=twin, kernel=kernel.kernel._replace(slot=None))]

    def lose(self, eqn, values) -> list[tw.Value]:
        """Anything else: the twin is lost, and operands that meet a kernel are watched."""
        name = eqn.primitive.name
        kernels = [value for value in values if value.kernel]
        held = [value for value in kernels if value.held]
        if not held and name in PRODUCTS and any(v.data and not v.kernel for v in values):
            held = [value for value in kernels if value.kernel.lost]  # weights, to be safe
        if not held:
            return self._activations(eqn, values)
        first = held[0].kernel.paths
        combined = any(value.kernel.paths != first for value in held)
        lost = next((value.kernel.lost for value in held if value.kernel.lost), None)
        problem = _CHANGED if lost and name in PRODUCTS else _NO_PRODUCT
        use = self.describe(eqn, values, tw.paths(held), _COMBINED if combined else problem)
        if lost:
            what = "" if lost.problem == _NO_PRODUCT else f", {lost.problem}"
            use = use._replace(problem=f"{use.problem}, after {lost}{what}")
        self.uses.append(use)
        number = all(value.kernel.number for value in held)
        if not number and name not in (*SUMS, *JOINS, *LAYOUTS):
            spared = () if combined else (first,)
            values = [self._watched(value, use, spared) for value in values]
        outs = tw.outputs(eqn, values)
        if name in PRODUCTS and any(value.data for value in values if not value.kernel):
            return outs  # of data that is not differentiated: a first layer's activations
        if number and not all(value.kernel or value.constant for value in values):
            return outs
        kernel = tw.Kernel(tw.paths(held), lost=lost or use)
        reduced = any(jnp.ndim(value.array) for value in held)
        return [
            out._replace(
                kernel=kernel._replace(number=number or (reduced and not jnp.ndim(out.array)))
            )
            if name in LAYOUTS or tw.is_float(out)  # a cast to integers remains a kernel
            else out
            for out in outs
        ]

    def _activations(self, eqn, values):
        """Lookups are taken for activations, but a product that lost its twin for weights still."""
        name = eqn.primitive.name
        kernel, *more = [value.kernel for value in values if value.kernel]
        others = [value for value in values if not value.kernel]
        alone = not more and not any(value.data for value in others)
        if kernel.lost and alone and name in (*LAYOUTS, *SUMS, "mul", "div"):
            return [out._replace(kernel=kernel) for out in tw.outputs(eqn, values)]
        for path in tw.paths(values):
            self.activations.setdefault(path, self.describe(eqn, values, (path,)))
        if kernel.lookup == "product" and name not in (*SUMS, *JOINS, *LAYOUTS):
            use = self.used(
                eqn, values, kernel.paths, "after a product with a constant, which is exact"
            )
            use = self.uses[-1] = use._replace(refused=False)
            spared = [value.kernel.paths for value in values if value.kernel]
            values = [self._watched(value, use, spared) for value in values]
        return tw.outputs(eqn, values)

    def _watched(self, value, use, spared):
        """Watches a value, unless it derives from params that are spared or has no cotangent."""
        if not tw.is_float(value) or (value.kernel and value.kernel.paths in spared):
            return value
        return value._replace(array=self.watch(value.array, use))

    def used(self, eqn, values, paths, problem="") -> tw.Use:
        """Takes note of a use of kernels."""
        self.uses.append(self.describe(eqn, values, paths, problem))
        return self.uses[-1]

    def describe(self, eqn, values, paths, problem="") -> tw.Use:
        """Describes an equation as a use of kernels."""
        operands = tuple(
            jax.ShapeDtypeStruct(jnp.shape(v.array), jnp.result_type(v.array)) for v in values
        )
        return tw.Use(paths, eqn.primitive.name, self._line_of(eqn), operands, problem)

    def _line_of(self, eqn):
        """A function that JAX traced before and took from its cache has no line of its own."""
        return source_info_util.summarize(eqn.source_info) or self.line


_ARRAYS = (jax.Array, np.ndarray, np.generic)
_CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_NO_PRODUCT = "which is no product that could go through feedback"
_CHANGED = "where other weights than this kernel meet it"
_COMBINED = "where kernels with feedback are combined before they meet an activation"


def _refuse_modules(*args):
    """An NNX module's changes (batch statistics, keys of dropout) would be lost in a trace."""
    for arg in args:
        for base in type(arg).__mro__:
            if base.__name__ == "Module" and base.__module__.startswith("flax.nnx"):
                raise ValueError(
                    f"an argument is the NNX module {type(arg).__name__}, whose variables could "
                    "not be updated. Split it, graphdef, params, rest = nnx.split(model, "
                    "nnx.Param, ...); merge inside the function, nnx.merge(graphdef, params, "
                    "rest); and return what changes, such as nnx.state(model, nnx.BatchStat)."
                )


def _vary_like(twin, kernel):
    """Inside `shard_map`, marks feedback as varying over the axes over which its kernel does."""
    axes = tuple(_varying(kernel) - _varying(twin))
    if not axes:
        return twin
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(twin, axes, to="varying")
    return jax.lax.pvary(twin, axes)  # type: ignore[attr-defined]  # before JAX 0.9


def _varying(x) -> frozenset:
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying  # before JAX 0.10, and since


def _twins(values):
    """Operands of an op on twins; those without one stand for themselves, as constants."""
    return [
        value.twin
        if value.twin is not None
        else ops.detach(value.array)
        if tw.is_float(value)
        else value.array
        for value in values
    ]


def _bilinear(eqn) -> bool:
    """Whether a function with a custom derivative is linear in each of two operands."""
    if len(eqn.invars) != 2 or len(eqn.outvars) != 1:
        return False
    call = core.jaxpr_as_fun(eqn.params["call_jaxpr"])
    x, kernel, y = (v.aval for v in (*eqn.invars, *eqn.outvars))
    x, kernel, y = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel, y))

    def transpose(x, kernel, y):
        return (
            jax.linear_transpose(lambda x: call(x, kernel), x)([y]),
            jax.linear_transpose(lambda kernel: call(x, kernel), kernel)([y]),
        )

    try:
        jax.eval_shape(transpose, x, kernel, y)
    except Exception:  # whatever JAX says of functions that are not linear
        return False
    return True


def _through_own_rule(op, x, kernel, feedback):
    """`ops.through_feedback` of an op whose own derivative rule is to be kept."""

    def f(y, x, feedback):
        del x, feedback
        return y

    def f_fwd(y, x, feedback):
        return y, (x, feedback)

    def f_bwd(residuals, y_bar):
        x, feedback = residuals
        _, vjp = jax.vjp(lambda x: op(x, feedback), x)
        return y_bar, *vjp(y_bar), None

    f = jax.custom_vjp(f)
    f.defvjp(f_fwd, f_bwd)
    return f(op(ops.detach(x), kernel), x, feedback)
