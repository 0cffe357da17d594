"""Trees: which feedback leaf belongs to which kernel, in every kind of tree."""

import dataclasses
import functools
import re

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import strategies as st

import soap_jax.nnx
from soap_jax import trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module that is its own pytree, as Equinox's are."""

    weight: jax.Array
    bias: jax.Array | None
    name: str = dataclasses.field(default="linear", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Network:
    layers: list
    value: jax.Array


class Model(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Linear(3, 4, rngs=rngs)
        self.hidden = nnx.List([soap_jax.nnx.FeedbackLinear(4, 5, rngs=rngs)])
        self.conv = soap_jax.nnx.FeedbackConv(2, 3, (3, 1), rngs=rngs)


@functools.cache
def split_model():
    return nnx.split(Model(nnx.Rngs(0)))


def nnx_model():
    return nnx.merge(*split_model(), copy=True)


def arrays(*shapes):
    return [jnp.full(shape, i + 1.0) for i, shape in enumerate(shapes)]


def pairs(params, feedback):
    """The pairs that `map_pairs` finds, by path."""
    found = {}
    trees.map_pairs(lambda path, *pair: found.update({"/".join(path): pair}), params, feedback)
    return found


# Pairing


def test_dicts_pair_by_path():
    w1, b1, w2, b2 = arrays((2, 3), (2, 3), (3, 5), (3, 5))
    params = {"in": {"kernel": w1, "bias": jnp.zeros(3)}, "out": {"kernel": w2}}
    found = pairs(params, {"out": {"kernel": b2}, "in": {"kernel": b1}})
    assert found.keys() == {"in/kernel", "out/kernel"}
    chex.assert_trees_all_equal(found["in/kernel"], (w1, b1))
    chex.assert_trees_all_equal(found["out/kernel"], (w2, b2))


def test_lists_and_tuples_pair_by_index():
    w1, b1, w2, b2 = arrays((2, 3), (2, 3), (3, 5), (3, 5))
    found = pairs([(w1, jnp.zeros(3)), (w2, jnp.zeros(5))], [(b1, None), (b2, None)])
    assert found.keys() == {"0/0", "1/0"}
    chex.assert_trees_all_equal(found["1/0"], (w2, b2))


def test_registered_dataclasses_pair_by_attribute():
    w, b, value = arrays((2, 3), (2, 3), (4,))
    params = Network([Linear(w, jnp.zeros(3))], value)
    feedback = Network([Linear(b, None)], None)
    found = pairs(params, feedback)
    assert found.keys() == {"layers/0/weight"}
    chex.assert_trees_all_equal(found["layers/0/weight"], (w, b))


def test_nnx_feedback_pairs_with_its_sibling_kernel():
    model = nnx_model()
    params, feedback = nnx.state(model, nnx.Param), nnx.state(model, soap_jax.nnx.Feedback)
    found = pairs(params, feedback)
    assert found.keys() == {"hidden/0/feedback", "conv/feedback"}
    hidden = model.hidden[0]
    chex.assert_trees_all_equal(
        found["hidden/0/feedback"], (hidden.kernel[...], hidden.feedback[...])
    )
    chex.assert_trees_all_equal(found["conv/feedback"][0], model.conv.kernel[...])


def test_nnx_states_give_an_nnx_state():
    model = nnx_model()
    params, feedback = nnx.state(model, nnx.Param), nnx.state(model, soap_jax.nnx.Feedback)
    exact = trees.at_kernels(params, feedback)
    assert jax.tree.structure(exact) == jax.tree.structure(feedback)
    nnx.update(model, exact)
    chex.assert_trees_all_equal(model.conv.feedback[...], model.conv.kernel[...])
    assert isinstance(model.conv.feedback, soap_jax.nnx.Feedback)


def test_a_leaf_called_feedback_prefers_its_own_path():
    w, b, kernel = arrays((2, 3), (2, 3), (5, 7))
    found = pairs({"feedback": w, "kernel": kernel}, {"feedback": b})
    chex.assert_trees_all_equal(found["feedback"], (w, b))


@pytest.mark.parametrize("box_params", [True, False])
@pytest.mark.parametrize("box_feedback", [True, False])
def test_flax_boxes_do_not_count(box_params, box_feedback):
    w, b = arrays((2, 3), (2, 3))

    def box(leaf, boxed):
        return nn.Partitioned(leaf, names=("in", None)) if boxed else leaf

    params = {"out": {"kernel": box(w, box_params)}}
    feedback = {"out": {"kernel": box(b, box_feedback)}}
    assert pairs(params, feedback).keys() == {"out/kernel"}
    exact = trees.at_kernels(params, feedback)
    assert jax.tree.structure(exact) == jax.tree.structure(feedback)
    chex.assert_trees_all_equal(nn.unbox(exact)["out"]["kernel"], w)


def test_none_leaves_stay_none_and_missing_ones_are_not_made():
    w, b = arrays((2, 3), (2, 3))
    params = {"a": {"kernel": w}, "b": {"kernel": w}, "c": {"kernel": w}}
    exact = trees.at_kernels(params, {"a": {"kernel": b}, "b": {"kernel": None}})
    assert exact.keys() == {"a", "b"}
    assert exact["b"] == {"kernel": None}


def test_a_none_leaf_needs_no_kernel():
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    assert trees.at_kernels(params, {"a": {"bias": None}}) == {"a": {"bias": None}}


@pytest.mark.parametrize("tree", [{}, [], (), None])
def test_an_empty_feedback_tree_has_no_pairs(tree):
    params = {"kernel": jnp.ones((2, 3))}
    assert pairs(params, tree) == {}
    assert trees.at_kernels(params, tree) == tree


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_at_kernels_takes_the_kernels_as_they_are_whatever_feedback_is_stored_in(dtype):
    params = {"kernel": jnp.array([[0.1, -2.5]])}
    exact = trees.at_kernels(params, {"kernel": jnp.zeros((1, 2), dtype)})
    assert exact["kernel"].dtype == jnp.float32
    chex.assert_trees_all_equal(exact, params)


def test_map_pairs_works_under_jit():
    w, b = arrays((2, 3), (2, 3))
    dot = jax.jit(lambda p, f: trees.map_pairs(lambda path, w, b: jnp.vdot(w, b), p, f))
    assert dot({"kernel": w}, {"kernel": b})["kernel"] == 6 * 1 * 2


names = st.text("abc", min_size=1, max_size=2)
nested = st.recursive(
    st.just((2, 3)),
    lambda inner: st.one_of(
        st.dictionaries(names, inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


@hypothesis.given(nested)
def test_any_tree_pairs_with_itself(shapes):
    def is_shape(node):
        return isinstance(node, tuple)

    params = jax.tree.map(lambda shape: np.ones(shape, np.float32), shapes, is_leaf=is_shape)
    feedback = jax.tree.map(np.zeros_like, params)
    chex.assert_trees_all_equal(trees.at_kernels(params, feedback), params)
    assert len(pairs(params, feedback)) == len(jax.tree.leaves(params))


def test_feedback_without_a_kernel_raises():
    params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}}
    message = re.escape(
        "feedback at ['Dense_1']['kernel'] has no kernel: params has no leaf there."
    )
    with pytest.raises(ValueError, match=message + r".*\['Dense_0'\]\['kernel'\]"):
        trees.map_pairs(lambda *pair: None, params, {"Dense_1": {"kernel": jnp.ones((2, 3))}})
    with pytest.raises(ValueError, match=r"\['feedback'\] has no kernel.*leaves of params: none"):
        trees.map_pairs(lambda *pair: None, {}, {"feedback": jnp.ones((2, 3))})


def test_feedback_of_another_shape_raises():
    params = {"Dense_1": {"kernel": jnp.ones((256, 10))}}
    message = re.escape(
        "feedback at ['Dense_1']['kernel'] has shape (10, 256); expected (256, 10), the shape of "
        "its kernel. Feedback is laid out like the kernel, not transposed."
    )
    with pytest.raises(ValueError, match=message):
        trees.map_pairs(lambda *pair: None, params, {"Dense_1": {"kernel": jnp.ones((10, 256))}})


def test_a_kernel_that_is_not_floating_point_raises():
    params = {"embed": {"kernel": jnp.ones((2, 3), jnp.int32)}}
    message = r"kernel at \['embed'\]\['kernel'\] has dtype int32; expected a floating-point"
    with pytest.raises(ValueError, match=message):
        trees.map_pairs(lambda *pair: None, params, {"embed": {"kernel": jnp.ones((2, 3))}})


# Selection


TRANSFORMER = {
    "attention": {"kernel": (4, 2, 3), "bias": (2, 3)},
    "norm": {"scale": (4,), "w": (4,)},
    "mlp": [{"weight": (4, 5)}, {"w": (5, 4), "b": (4,)}],
}


def transformer():
    return jax.tree.map(
        lambda shape: np.ones(shape, np.float32),
        TRANSFORMER,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def selected(where, params=None):
    return {"/".join(path) for path in trees.select(params or transformer(), where)}


def test_kernels_w_and_weights_of_two_axes_get_feedback_by_default():
    assert selected(None) == {"attention/kernel", "mlp/0/weight", "mlp/1/w"}


@pytest.mark.parametrize(
    "where, expected",
    [
        ("mlp/*", {"mlp/0/weight", "mlp/1/w", "mlp/1/b"}),
        ("*/kernel", {"attention/kernel"}),
        ("mlp/0/weight", {"mlp/0/weight"}),
        (["attention/bias", "mlp/?/w*"], {"attention/bias", "mlp/0/weight", "mlp/1/w"}),
        (("norm/*",), {"norm/scale", "norm/w"}),
        (lambda path, leaf: leaf.ndim == 3, {"attention/kernel"}),
        (lambda path, leaf: path.startswith("mlp/1"), {"mlp/1/w", "mlp/1/b"}),
    ],
)
def test_patterns_and_predicates_select_by_path(where, expected):
    assert selected(where) == expected


def test_kernels_inside_boxes_and_modules_are_found():
    w, bias = arrays((2, 3), (3,))
    boxed = {"out": {"kernel": nn.Partitioned(w, names=(None, None)), "bias": bias}}
    assert selected(None, boxed) == {"out/kernel"}
    assert selected(None, Network([Linear(w, bias)], bias)) == {"layers/0/weight"}
    state = nnx.state(nnx_model(), nnx.Param)
    assert selected(None, state) == {"stem/kernel", "hidden/0/kernel", "conv/kernel"}


def test_a_pattern_that_matches_nothing_raises():
    message = r"where='Dense_9/\*' matches no leaf of params.*\['attention'\]\['bias'\]"
    with pytest.raises(ValueError, match=message):
        trees.select(transformer(), ["mlp/*", "Dense_9/*"])


@pytest.mark.parametrize("where", [None, lambda path, leaf: False, []])
def test_selecting_nothing_raises(where):
    why = "kernel or w or weight" if where is None else "`where` selects none"
    message = rf"no leaf of params gets feedback.*{why}.*\['scale'\]"
    with pytest.raises(ValueError, match=message):
        trees.select({"scale": jnp.ones(3)}, where)


def test_selecting_a_leaf_that_is_not_floating_point_raises():
    with pytest.raises(ValueError, match=r"kernel at \['w'\] has dtype int8"):
        trees.select({"w": jnp.ones((2, 3), jnp.int8)}, None)


# Paths


def paths_of(tree):
    return [trees.path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_paths_are_names_from_root_to_leaf():
    assert paths_of({"a": [0.0, (1.0,)], "b": {"c": 2.0}}) == [
        ("a", "0"),
        ("a", "1", "0"),
        ("b", "c"),
    ]
    assert paths_of([Linear(0.0, 1.0)]) == [("0", "weight"), ("0", "bias")]
    assert paths_of(0.0) == [()]


def test_only_a_boxs_value_is_dropped_from_a_path():
    assert paths_of({"a": {"value": 0.0}}) == [("a", "value")]
    assert paths_of({"a": nn.Partitioned(0.0, names=())}) == [("a",)]
    assert paths_of({"a": nnx.Param(jnp.ones(()))}) == [("a",)]


def test_named_leaves_are_flat_and_none_is_no_leaf():
    tree = {"a": {"kernel": 1, "bias": None}, "b": (2, 3)}
    assert trees.named(tree) == {"a/kernel": 1, "b/0": 2, "b/1": 3}
    assert trees.named(4) == {"": 4}
    with pytest.raises(ValueError, match="two leaves are called 'a/kernel'"):
        trees.named({"a": {"kernel": 1}, "a/kernel": 2})


def test_paths_print_as_subscripts():
    assert trees.show(("Dense_1", "kernel")) == "['Dense_1']['kernel']"
    assert trees.show(()) == "params"


@pytest.mark.parametrize(
    "pattern, path, expected",
    [
        ("*", ("a", "b"), True),
        ("a/*", ("a", "b", "c"), True),
        ("*/c", ("a", "b", "c"), True),
        ("a", ("a", "b"), False),
        ("A/*", ("a", "b"), False),
        ("a?/b", ("a1", "b"), True),
        ("[ab]/c", ("b", "c"), True),
    ],
)
def test_patterns_are_globs_over_the_whole_path(pattern, path, expected):
    assert trees.matches(pattern, path) is expected


def test_a_feedback_state_in_place_of_its_tree_is_recognised():
    params = {"w": jnp.ones((3, 2))}
    state = soap_jax.init_feedback(jax.random.key(0), params)
    with pytest.raises(ValueError, match=r"Is it a FeedbackState\? Pass its tree, `state\.feed"):
        trees.pairs(params, state)
