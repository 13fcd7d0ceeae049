"""Masks: exact counts, distributions against a second implementation, bounds, labels, errors, containers."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_structure.sparsity.masks import _leaf_counts, apply_masks, density, is_kernel, nonzero, random_masks

KEY = jax.random.key(0)
MLP = {
    "hidden": {"kernel": jnp.ones((40, 20)), "bias": jnp.ones(20)},
    "head": {"kernel": jnp.ones((20, 5)), "bias": jnp.ones(5)},
}


def kernel_counts(masks: dict) -> dict[str, int]:
    return {name: int(layer["kernel"].sum()) for name, layer in masks.items()}


def erk_shares(shapes: list[tuple[int, ...]], share: float) -> np.ndarray:
    """Real-valued ERK counts by the published recipe: leaves that would exceed 1 become dense, one at a time."""
    size = np.array([math.prod(s) for s in shapes], float)
    raw = np.array([sum(s) / math.prod(s) for s in shapes])
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        if not rest:
            return size
        epsilon = (share * size.sum() - sum(size[i] for i in dense)) / sum(raw[i] * size[i] for i in rest)
        worst = max(rest, key=lambda i: raw[i])
        if epsilon * raw[worst] <= 1:
            return np.array([size[i] if i in dense else epsilon * raw[i] * size[i] for i in range(len(shapes))])
        dense.add(worst)


def test_erk_by_hand() -> None:
    # 2 leaves of 40 x 20 = 800 and 20 x 5 = 100: round(0.2 * 900) = 180, weights 60 and 25.
    # 180 * 60 / 85 = 127.06, 180 * 25 / 85 = 52.94: floors 127 and 52, the missing one to the larger remainder.
    assert kernel_counts(random_masks(KEY, MLP, 0.2)) == {"hidden": 127, "head": 53}
    # round(0.5 * 900) = 450: 450 * 25 / 85 = 132 exceeds the head's 100, so it is dense and hidden gets 350.
    assert kernel_counts(random_masks(KEY, MLP, 0.5)) == {"hidden": 350, "head": 100}
    # round(0.03 * 900) = 27: 19.06 and 7.94; hidden needs 20 (one a unit), so the head gives one.
    assert kernel_counts(random_masks(KEY, MLP, 0.03)) == {"hidden": 20, "head": 7}


def test_uniform_by_hand() -> None:
    # 0.2 of 800 and of 100.
    assert kernel_counts(random_masks(KEY, MLP, 0.2, distribution="uniform")) == {"hidden": 160, "head": 20}
    # Three leaves of 10 at 0.15: each wants 1.5, the total is round(4.5) = 4 (to even).
    three = {name: jnp.ones((10, 1)) for name in "abc"}
    counts = [int(m.sum()) for m in jax.tree.leaves(random_masks(KEY, three, 0.15, distribution="uniform"))]
    assert counts == [2, 1, 1]


def test_a_convolution_counts_its_kernel_axes() -> None:
    params = {"conv": jnp.ones((3, 3, 8, 16)), "head": jnp.ones((16, 10))}
    # ERK weights 3 + 3 + 8 + 16 = 30 and 26; 1152 + 160 = 1312 entries; 0.1 -> 131: 70.18 and 60.82.
    masks = random_masks(KEY, params, 0.1)
    assert (int(masks["conv"].sum()), int(masks["head"].sum())) == (70, 61)
    assert masks["conv"].shape == (3, 3, 8, 16)
    assert masks["conv"].any(axis=(0, 1, 2)).all() and masks["head"].any(axis=0).all()
    with pytest.raises(ValueError, match=r"fan-in 72 of 'conv'"):
        random_masks(KEY, {"conv": params["conv"]}, 0.9, min_fan_in=73)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6),
    st.floats(0.001, 1.0),
    st.booleans(),
)
def test_counts_follow_the_published_recipe(shapes: list[tuple[int, int]], share: float, conv: bool) -> None:
    full = [(2, 2, *shape) if conv else shape for shape in shapes]
    named = {str(i): shape for i, shape in enumerate(full)}
    got = np.array(list(_leaf_counts(named, share, "erk", 0, "density").values()))
    sizes = np.array([math.prod(s) for s in full])
    assert got.sum() == round(share * int(sizes.sum()))
    assert (got >= 0).all() and (got <= sizes).all()
    np.testing.assert_allclose(got, erk_shares(full, share), atol=1.6)  # rounding, and the budget's own rounding
    uniform = np.array(list(_leaf_counts(named, share, "uniform", 0, "density").values()))
    assert uniform.sum() == got.sum()
    np.testing.assert_allclose(uniform, share * sizes, atol=1.6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(3, 40), st.integers(1, 40)), min_size=1, max_size=5),
    st.floats(0.001, 1.0),
    st.integers(0, 3),
    st.sampled_from(["erk", "uniform"]),
)
def test_counts_pay_min_fan_in_or_raise(
    shapes: list[tuple[int, int]], share: float, fan_in: int, distribution: str
) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    sizes = np.array([math.prod(s) for s in shapes])
    needs = np.array([fan_in * s[-1] for s in shapes])
    budget = round(share * int(sizes.sum()))
    if budget < needs.sum():
        with pytest.raises(ValueError, match="smallest density that can pay") as error:
            _leaf_counts(named, share, distribution, fan_in, "density")
        smallest = float(re.search(r"can pay is ([0-9.e-]+[0-9])", str(error.value)).group(1))  # type: ignore[union-attr]
        assert sum(_leaf_counts(named, smallest, distribution, fan_in, "density").values()) == needs.sum()
        return
    got = np.array(list(_leaf_counts(named, share, distribution, fan_in, "density").values()))
    assert got.sum() == budget
    assert (got >= needs).all() and (got <= sizes).all()


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("share", [0.075, 0.02 + 0.05, 0.3, 0.999, 1.0, 1])
@pytest.mark.parametrize("fan_in", [0, 1, 3])
def test_masks_hold_the_counts_and_feed_every_unit(distribution: str, share: float, fan_in: int) -> None:
    params = {"a": jnp.ones((50, 12)), "b": jnp.ones((12, 6)), "bias": jnp.ones(6)}
    total = 50 * 12 + 12 * 6
    if round(share * total) < fan_in * 18:
        with pytest.raises(ValueError, match=f"density={share}.*{fan_in * 18 / total!r}"):
            random_masks(KEY, params, share, distribution=distribution, min_fan_in=fan_in)
        return
    masks = random_masks(KEY, params, share, distribution=distribution, min_fan_in=fan_in)
    assert nonzero(masks) == round(share * total)
    assert density(masks) == round(share * total) / total
    assert masks["bias"].shape == () and masks["bias"].dtype == jnp.bool_ and bool(masks["bias"])
    for name in "ab":
        assert masks[name].dtype == jnp.bool_ and masks[name].shape == params[name].shape
        assert int(masks[name].sum(0).min()) >= fan_in


def test_the_smallest_density_leaves_exactly_min_fan_in() -> None:
    masks = random_masks(KEY, MLP, 2 * 25 / 900, min_fan_in=2)
    assert masks["hidden"]["kernel"].sum(0).tolist() == [2] * 20
    assert masks["head"]["kernel"].sum(0).tolist() == [2] * 5


def test_positions_are_uniform_and_depend_on_the_key() -> None:
    params = {"kernel": jnp.ones((6, 5))}
    draws = np.stack([np.asarray(random_masks(jax.random.key(i), params, 0.4)["kernel"]) for i in range(400)])
    assert (draws.sum((1, 2)) == 12).all()
    share = draws.mean(0)  # 0.4 everywhere by symmetry; one standard error is 0.0245
    assert abs(share - 0.4).max() < 5 * 0.0245
    assert len({draw.tobytes() for draw in draws}) == 400
    np.testing.assert_array_equal(random_masks(KEY, params, 0.4)["kernel"], random_masks(KEY, params, 0.4)["kernel"])


def test_leaves_of_one_shape_get_different_masks() -> None:
    masks = random_masks(KEY, {"a": jnp.ones((20, 20)), "b": jnp.ones((20, 20))}, 0.3)
    assert not np.array_equal(masks["a"], masks["b"])


def test_density_by_label() -> None:
    labels = {"hidden": {"kernel": "scaffold", "bias": "scaffold"}, "head": {"kernel": "new", "bias": "free"}}
    shares = {"scaffold": 0.1, "new": 0.5}
    for given_labels in (labels, lambda params: labels):
        masks = random_masks(KEY, MLP, shares, given_labels)
        assert kernel_counts(masks) == {"hidden": 80, "head": 50}
    # A label that only leaves outside the selection carry may be named: it has nothing to mask.
    assert nonzero(random_masks(KEY, MLP, shares | {"free": 0.5}, labels)) == 130
    with pytest.raises(ValueError, match="labels are needed"):
        random_masks(KEY, MLP, shares)
    with pytest.raises(ValueError, match=r"no entry for the label 'new' of 'head/kernel'"):
        random_masks(KEY, MLP, {"scaffold": 0.1}, labels)
    with pytest.raises(ValueError, match=r"density names \['patch'\]"):
        random_masks(KEY, MLP, shares | {"patch": 0.1}, labels)
    with pytest.raises(ValueError, match=r"density\['new'\]=1.5"):
        random_masks(KEY, MLP, {"scaffold": 0.1, "new": 1.5}, labels)
    with pytest.raises(ValueError, match=r"density\['new'\]=0.01 gives 1 connections.*0.05"):
        random_masks(KEY, MLP, {"scaffold": 0.1, "new": 0.01}, labels)
    # A group is one budget: two leaves of one label are distributed by ERK, as in test_erk_by_hand.
    one = jax.tree.map(lambda _: "all", MLP)
    assert kernel_counts(random_masks(KEY, MLP, {"all": 0.2}, one)) == {"hidden": 127, "head": 53}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, float("nan"), float("inf"), "0.1", True, None])
def test_densities_outside_the_range_raise(share: object) -> None:
    with pytest.raises(ValueError, match=r"density=.*\(0, 1\]"):
        random_masks(KEY, MLP, share)  # type: ignore[arg-type]


def test_other_bad_input_raises() -> None:
    with pytest.raises(ValueError, match="distribution='er'"):
        random_masks(KEY, MLP, 0.5, distribution="er")  # type: ignore[arg-type]
    for fan_in in (-1, 1.5, True):
        with pytest.raises(ValueError, match="min_fan_in="):
            random_masks(KEY, MLP, 0.5, min_fan_in=fan_in)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="select"):
        random_masks(KEY, {"bias": jnp.ones(3)}, 0.5)


def test_select_and_is_kernel() -> None:
    assert is_kernel("a/kernel", jax.ShapeDtypeStruct((3, 4), jnp.float32))
    assert not is_kernel("a/bias", jnp.ones(3))
    assert not is_kernel("a/embedding", jnp.ones((3, 4)))
    assert is_kernel("embedding/kernel", jnp.ones((3, 4)))
    assert not is_kernel("a", 1.0)
    masks = random_masks(KEY, MLP, 0.2, select=lambda path, leaf: path == "hidden/kernel")
    assert masks["head"]["kernel"].shape == () and nonzero(masks) == 160


def test_shapes_suffice_and_jit_agrees() -> None:
    eager = random_masks(KEY, MLP, 0.2)
    abstract = random_masks(KEY, jax.eval_shape(lambda: MLP), 0.2)
    jitted = jax.jit(lambda key: random_masks(key, MLP, 0.2))(KEY)
    for other in (abstract, jitted):
        jax.tree.map(np.testing.assert_array_equal, eager, other)


def test_lists_tuples_and_nnx_states() -> None:
    nested = [(jnp.ones((30, 10)), jnp.ones(10)), {"x": [jnp.ones((10, 4))]}]
    masks = random_masks(KEY, nested, 0.25)
    assert jax.tree.structure(masks) == jax.tree.structure(nested)
    assert nonzero(masks) == round(0.25 * 340)

    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Sequential(nnx.Linear(30, 10, rngs=nnx.Rngs(0)), nnx.Linear(10, 4, rngs=nnx.Rngs(1)))
    state = nnx.state(model, nnx.Param)
    masks = random_masks(KEY, state, 0.25)
    assert jax.tree.structure(masks) == jax.tree.structure(state)
    assert nonzero(masks) == round(0.25 * 340)
    masked = apply_masks(state, masks)
    assert jax.tree.structure(masked) == jax.tree.structure(state)
    assert sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(masked) if leaf.ndim == 2) == nonzero(masks)


def test_apply_masks_is_exact_and_keeps_dtypes() -> None:
    params = {"w": jnp.array([[jnp.nan, 2.0], [jnp.inf, -4.0]], jnp.bfloat16), "b": jnp.array([1.0, jnp.nan])}
    masks = {"w": jnp.array([[False, True], [False, False]]), "b": jnp.asarray(True)}
    for masked in (apply_masks(params, masks), jax.jit(apply_masks)(params, masks)):
        assert masked["w"].dtype == jnp.bfloat16 and masked["b"].dtype == jnp.float32
        assert masked["w"].astype(jnp.float32).tolist() == [[0.0, 2.0], [0.0, 0.0]]
        assert not np.signbit(np.asarray(masked["w"], np.float32)).any()
        np.testing.assert_array_equal(masked["b"], params["b"])
    with pytest.raises(ValueError, match=r"shape \(2, 3\) at 'w'"):
        apply_masks(params, masks | {"w": jnp.ones((2, 3), bool)})
    with pytest.raises(ValueError, match="masks"):
        apply_masks(params, {"w": masks["w"]})


def test_counts_leave_scalars_out() -> None:
    masks = {"a": jnp.array([[True, False], [False, False]]), "b": jnp.asarray(True), "c": [jnp.ones((3, 2), bool)]}
    assert nonzero(masks) == 7 and isinstance(nonzero(masks), int)
    assert density(masks) == 0.7
    assert nonzero({"b": jnp.asarray(True)}) == 0 and density({"b": jnp.asarray(True)}) == 1.0
