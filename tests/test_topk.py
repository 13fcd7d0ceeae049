"""Exact selection against a stable sort: ties, zeros, infinities, NaN, every dtype, trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from optax_structure.sparsity import topk
from optax_structure.sparsity.draws import random_scores, top_k_at_random
from optax_structure.sparsity.topk import kth_largest, top_k_mask, top_k_mask_tree

EDGES = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
SIZE = 24  # one shape for all random examples, so that they compile once


def expected(scores: np.ndarray, k: int, where: np.ndarray | None = None) -> np.ndarray:
    """The same by a stable sort in NumPy: rank by (is a candidate, is not NaN, score), then by flat index."""
    flat = np.asarray(scores).ravel()
    values = flat.astype(np.float64) if flat.dtype.kind not in "iub" else flat.astype(np.int64)
    candidates = np.ones(flat.shape, bool) if where is None else np.broadcast_to(where, scores.shape).ravel()
    nan = np.isnan(values)
    values = np.where(nan, 0, values)
    order = np.lexsort((np.arange(flat.size), -values, nan, ~candidates))  # the last key is the first in rank
    mask = np.zeros(flat.shape, bool)
    mask[order[: min(k, candidates.sum())]] = True
    return mask.reshape(scores.shape)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(EDGES), st.floats(width=32)), min_size=SIZE, max_size=SIZE),
    st.integers(0, SIZE + 2),
    st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
)
def test_equals_a_stable_sort(values: list[float], k: int, candidates: list[bool]) -> None:
    scores, where = np.array(values, np.float32), np.array(candidates)
    np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), k), expected(scores, k))
    np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), k, jnp.asarray(where)), expected(scores, k, where))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "uint32", "bool"])
@pytest.mark.parametrize("k", [0, 1, 7, 35, 36, 100])
def test_every_dtype_with_ties(dtype: str, k: int) -> None:
    scores = jnp.asarray(np.random.default_rng(0).integers(-3 if dtype[0] in "bfi" else 0, 4, (4, 9)), dtype)
    mask = top_k_mask(scores, k)
    assert mask.dtype == jnp.bool_ and mask.shape == scores.shape
    reference = np.asarray(scores.astype(jnp.float32)) if dtype == "bfloat16" else np.asarray(scores)
    np.testing.assert_array_equal(mask, expected(reference, k))


def test_integers_at_their_limits_are_not_rounded() -> None:
    scores = np.array([2**31 - 1, -(2**31), 2**24 + 1, 2**24, -(2**31) + 1], np.int32)
    for k in range(6):
        np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), k), expected(scores, k))
    # The lowest candidate shares its key with what is no candidate, and wins.
    where = np.array([False, True, False, False, True])
    np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), 2, jnp.asarray(where)), where)


def test_nan_is_taken_last_and_zeros_are_equal() -> None:
    scores = jnp.array([jnp.nan, -jnp.inf, -0.0, 0.0, -0.0])
    assert top_k_mask(scores, 2).tolist() == [False, False, True, True, False]
    assert top_k_mask(scores, 4).tolist() == [False, True, True, True, True]
    assert top_k_mask(scores, 5).tolist() == [True] * 5
    assert top_k_mask(scores, 2, jnp.array([True, True, False, False, False])).tolist() == [True, True] + [False] * 3


@pytest.mark.parametrize("k", [0, 1, 500, 9_999, 10_000])
def test_large_leaf_with_many_ties(k: int) -> None:
    scores = np.round(np.random.default_rng(1).normal(size=(100, 100)) * 3).astype(np.float32)
    np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), k), expected(scores, k))
    np.testing.assert_array_equal(top_k_mask(jnp.zeros((100, 100)), k), np.arange(10_000).reshape(100, 100) < k)


@pytest.mark.parametrize("kind", ["normal", "wide", "half zero", "nearly all equal", "by columns", "limits", "uint32"])
def test_a_leaf_large_enough_to_be_sampled(kind: str) -> None:
    rng, shape = np.random.default_rng(5), (300, 257)
    normal = rng.normal(size=shape)
    scores = {
        "normal": np.abs(normal),
        "wide": normal * np.exp(20 * rng.normal(size=shape)),
        "half zero": np.where(normal > 0, normal, 0),
        "nearly all equal": np.where(rng.random(shape) < 1e-3, normal, 0.25),  # a sample sees one number
        "by columns": np.where(np.arange(shape[1]) % 8 == 3, 1e6, 0) + normal,  # a sample by steps misses or doubles it
        "limits": rng.choice(np.array(EDGES), shape),
        "uint32": rng.choice(np.array([0, 1, 2**32 - 2, 2**32 - 1]), shape),
    }[kind].astype(np.uint32 if kind == "uint32" else np.float32)
    where = rng.random(shape) < 0.3
    for k in (0, 1, 2, 40, 7_000, int(where.sum()) - 1, int(where.sum()), 70_000):
        np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), k, where), expected(scores, k, where), str(k))
        np.testing.assert_array_equal(top_k_mask(jnp.asarray(scores), k), expected(scores, k), str(k))


def test_a_large_tree_of_many_shapes() -> None:
    rng = np.random.default_rng(6)
    shapes = [(), (3,), (3, 3, 16, 300), (70_000,), (1, 9_000), (2, 2, 2, 2, 2)]
    tree = [rng.normal(size=shape).astype(np.float32) * 10.0**n for n, shape in enumerate(shapes)]
    flat = np.concatenate([leaf.ravel() for leaf in tree])
    for k in (0, 3, 5_000, 100_000, flat.size):
        got = np.concatenate([np.ravel(leaf) for leaf in top_k_mask_tree([jnp.asarray(leaf) for leaf in tree], k)])
        np.testing.assert_array_equal(got, expected(flat, k))


def test_tree_equals_the_concatenation() -> None:
    rng = np.random.default_rng(2)
    tree = {
        "a": rng.integers(0, 5, (3, 4)).astype(np.float32),
        "b": [rng.integers(0, 5, 7).astype(np.float32), rng.integers(0, 5, ()).astype(np.float32)],
        "c": {"d": rng.integers(0, 5, (2, 2, 3)).astype(np.float32)},
    }
    flat = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    for k in range(flat.size + 2):
        masks = top_k_mask_tree(jax.tree.map(jnp.asarray, tree), k)
        assert jax.tree.structure(masks) == jax.tree.structure(tree)
        got = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(masks)])
        np.testing.assert_array_equal(got, expected(flat, k))


def test_tree_where_scalars_arrays_and_prefixes() -> None:
    scores = {"a": jnp.array([5.0, 1.0, 5.0]), "skip": jnp.array([99.0]), "b": {"c": jnp.array([5.0, 7.0])}}
    where = {"a": jnp.array([False, True, True]), "skip": jnp.asarray(False), "b": True}
    masks = top_k_mask_tree(scores, 3, where)
    assert jax.tree.map(lambda m: m.tolist(), masks) == {
        "a": [False, False, True],
        "skip": [False],
        "b": {"c": [True, True]},
    }
    assert sum(int(m.sum()) for m in jax.tree.leaves(top_k_mask_tree(scores, 99, where))) == 4
    with pytest.raises(ValueError, match="where"):
        top_k_mask_tree(scores, 1, {"a": True, "b": True})
    assert top_k_mask_tree({}, 3) == {}


def test_tree_of_one_kind_of_numbers_only() -> None:
    scores = {"a": jnp.array([1.0, 3.0], jnp.bfloat16), "b": jnp.array([2.0, 4.0], jnp.float32)}
    masks = top_k_mask_tree(scores, 2)
    assert masks["a"].tolist() == [False, True] and masks["b"].tolist() == [False, True]
    with pytest.raises(ValueError, match="kind"):
        top_k_mask_tree({"a": jnp.array([1.0]), "b": jnp.array([1])}, 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(EDGES), st.floats(width=32)), min_size=SIZE, max_size=SIZE),
    st.integers(1, SIZE),
)
def test_kth_largest_equals_a_sort(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32)
    ranked = sorted(scores.tolist(), key=lambda v: (np.isnan(v), -v if not np.isnan(v) else 0.0))
    np.testing.assert_array_equal(kth_largest(jnp.asarray(scores), k), np.float32(ranked[k - 1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "uint8"])
def test_kth_largest_keeps_the_dtype(dtype: str) -> None:
    values = jnp.asarray([[3, 9], [9, 1]], dtype)
    got = [kth_largest(values, k) for k in (1, 2, 3, 4)]
    assert all(v.dtype == values.dtype and v.shape == () for v in got)
    assert [int(v) for v in got] == [9, 9, 3, 1]


@pytest.mark.slow
def test_traced_count_in_jit_scan_and_vmap_without_retracing() -> None:
    scores = jnp.asarray(np.random.default_rng(3).normal(size=(5, 6)), jnp.float32)
    traces = []

    @jax.jit
    def select(scores: jax.Array, k: jax.Array) -> jax.Array:
        traces.append(1)
        return top_k_mask(scores, k)

    for k in (0, 3, 30):
        np.testing.assert_array_equal(select(scores, jnp.int32(k)), expected(np.asarray(scores), k))
    assert len(traces) == 1

    ks = jnp.arange(31)
    _, scanned = jax.lax.scan(lambda carry, k: (carry, top_k_mask(scores, k)), 0, ks)
    mapped = jax.vmap(lambda k: top_k_mask(scores, k))(ks)
    assert scanned.sum((1, 2)).tolist() == list(range(31))
    np.testing.assert_array_equal(scanned, mapped)
    columns = jax.vmap(top_k_mask, in_axes=(1, None), out_axes=1)(scores, 2)
    np.testing.assert_array_equal(columns, np.stack([expected(c, 2) for c in np.asarray(scores).T], 1))
    kth = jax.vmap(lambda k: kth_largest(scores, k))(jnp.arange(1, 31))
    np.testing.assert_array_equal(kth, np.sort(np.asarray(scores).ravel())[::-1])


def test_a_new_count_compiles_nothing() -> None:
    scores = jnp.arange(17.0)
    top_k_mask(scores, 3)
    before = topk.select._cache_size()
    for k in (4, np.int64(5), jnp.int32(6), 100, 10**12):
        top_k_mask(scores, k)
    assert topk.select._cache_size() == before


def test_no_sort_and_few_temporaries() -> None:
    scores = jnp.zeros((256, 256))
    lowered = jax.jit(lambda s, k: topk.top_k_mask(s, k)).lower(scores, jnp.int32(3))
    assert "sort" not in lowered.as_text()
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4 * scores.nbytes  # keys, positions and three bool arrays


def test_lowers_for_every_platform() -> None:
    from jax import export

    exported = export.export(jax.jit(lambda s, k: top_k_mask(s, k)), platforms=("cpu", "cuda", "tpu"))(
        jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("k", [-1, 1.5, True, "3", None])
def test_bad_counts_raise(k: object) -> None:
    with pytest.raises(ValueError, match="k="):
        top_k_mask(jnp.ones(3), k)  # type: ignore[arg-type]


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match="k must be an integer scalar"):
        top_k_mask(jnp.ones(3), jnp.array([1, 2]))
    with pytest.raises(ValueError, match="k must be an integer scalar"):
        top_k_mask(jnp.ones(3), jnp.float32(1))
    with pytest.raises(ValueError, match="complex"):
        top_k_mask(jnp.ones(3, jnp.complex64), 1)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k}"):
            kth_largest(jnp.ones(3), k)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("shape", [(20, 30), (300, 257)])
def test_ties_are_drawn_exactly(shape: tuple[int, int], x64: bool) -> None:
    with jax.enable_x64(x64):
        scores = {"a": jnp.zeros(shape, jnp.float32), "b": jnp.zeros(shape[::-1], jnp.float32).at[0].set(1)}
        where = {"a": jnp.ones(shape, bool), "b": jnp.ones(shape[::-1], bool)}
        first, other = (top_k_at_random(scores, jnp.int32(shape[0] + 37), where, jax.random.key(n)) for n in (0, 1))
        for chosen in (first, other):
            assert chosen["b"][0].all() and sum(int(mask.sum()) for mask in chosen.values()) == shape[0] + 37
        assert (first["a"] != other["a"]).any()
        scores = random_scores(jax.random.key(0), shape)
        assert scores.dtype == jnp.float32 and scores.min() >= 0 and scores.max() < 1


def test_the_passes_over_a_sampled_leaf_are_few() -> None:
    rng, size = np.random.default_rng(7), 70_000
    zeros = np.where(rng.random(size) < 0.95, 0, rng.normal(size=size) * 1e-20)
    for scores in (
        rng.normal(size=size),
        zeros,
        np.arange(size) % 64,
        np.float32(2.0) ** rng.integers(-140, 120, size),
    ):
        for k in (1, 2, size // 1000, size // 20, size // 2, size - 1):
            keys = topk._order_keys(jnp.asarray(scores, jnp.float32))
            trials = []
            bracket = topk._Bracket(jnp.uint32(0), keys.max(), jnp.int32(size), jnp.int32(0))
            while bracket.low < bracket.last and bracket.reached != k:
                trial = bracket.trial(jnp.int32(len(trials) + 2), jnp.int32(k))
                bracket = bracket.narrowed(trial, jnp.sum(keys >= trial), jnp.int32(k))
                trials.append(int(trial))
            assert len(trials) <= 40


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(6, 8), (402, 302)])
def test_a_sharded_leaf_stays_sharded(shape: tuple[int, int], axis: AxisType) -> None:
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("model",), axis_types=(axis,), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    scores = np.random.default_rng(4).integers(0, 9, shape).astype(np.float32)
    mask = top_k_mask(jax.device_put(scores, sharding), 11)
    np.testing.assert_array_equal(mask, expected(scores, 11))
    assert mask.sharding.is_equivalent_to(sharding, 2)
    compiled = jax.jit(top_k_mask).lower(jax.device_put(scores, sharding), 11).compile().as_text()
    assert f"[{shape[0]},{shape[1]}]" not in "".join(line for line in compiled.splitlines() if "all-gather" in line)
