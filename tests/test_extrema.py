"""Dead and saturated units: running means by hand, definitions case by case, behaviour inside jit and scan."""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_structure.extrema import (
    ActivationStats,
    Extrema,
    extrema_counts,
    extrema_over,
    find_extrema,
    init_activation_stats,
    update_activation_stats,
)


def stats_of(activations: dict, bounded: object = None) -> ActivationStats:
    arrays = {layer: jnp.asarray(a) for layer, a in activations.items()}
    return update_activation_stats(init_activation_stats(arrays, bounded=bounded), arrays)  # type: ignore[arg-type]


def indices(flags: jax.Array) -> list[int]:
    return np.flatnonzero(np.asarray(flags)).tolist()


def with_means(magnitudes: list[float]) -> dict[str, np.ndarray]:
    """Activations whose mean magnitudes are as given: one sample that shows them."""
    return {"layer": np.array([magnitudes], np.float32)}


def test_two_updates_by_hand() -> None:
    # Unit 0 is active on 1 of 2, then on 2 of 2 samples; unit 1 is negative (|a| counts), then silent.
    first = {"h": jnp.array([[4.0, -1.0], [0.0, -3.0]])}
    second = {"h": jnp.array([[1.0, 0.0], [2.0, 0.0]])}
    stats = update_activation_stats(init_activation_stats(first), first, decay=0.5)
    assert int(stats.count) == 1 and float(stats.weight) == 0.5
    assert (stats.active["h"] / stats.weight).tolist() == [0.5, 1.0]
    assert (stats.magnitude["h"] / stats.weight).tolist() == [2.0, 2.0]
    stats = update_activation_stats(stats, second, decay=0.75)
    # weight 0.75 * 0.5 + 0.25; active 0.75 * [0.25, 0.5] + 0.25 * [1, 0]; magnitude 0.75 * [1, 1] + 0.25 * [1.5, 0]
    assert int(stats.count) == 2 and float(stats.weight) == 0.625
    np.testing.assert_allclose(stats.active["h"], [0.4375, 0.375], rtol=1e-6)
    np.testing.assert_allclose(stats.magnitude["h"], [1.125, 0.75], rtol=1e-6)


def test_all_axes_but_the_last_are_averaged_in_float32() -> None:
    maps = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).clip(0)
    stats = stats_of({"conv": jnp.asarray(maps, jnp.bfloat16)})
    rounded = np.asarray(jnp.asarray(maps, jnp.bfloat16).astype(jnp.float32), np.float64)
    assert stats.magnitude["conv"].dtype == stats.active["conv"].dtype == jnp.float32
    np.testing.assert_allclose(stats.magnitude["conv"] / stats.weight, rounded.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(stats.active["conv"] / stats.weight, (rounded > 0).mean((0, 1, 2)), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 0.999), min_size=1, max_size=12), st.floats(0.015625, 100, width=32))
def test_constant_activations_are_read_exactly_whatever_the_decays(decays: list[float], level: float) -> None:
    activations = {"h": jnp.full((3, 2), level, jnp.float32)}
    stats = init_activation_stats(activations)
    for decay in decays:
        stats = update_activation_stats(stats, activations, decay=decay)
    np.testing.assert_allclose(stats.magnitude["h"] / stats.weight, level, rtol=1e-4)
    np.testing.assert_allclose(stats.active["h"] / stats.weight, 1.0, rtol=1e-4)


def test_nothing_is_reported_before_the_first_update() -> None:
    for bounded in (None, True):
        extrema = find_extrema(init_activation_stats({"h": jnp.ones((2, 5))}, bounded=bounded))
        assert extrema_counts(extrema) == {"h": {"dead": 0, "saturated": 0}}


def test_a_rare_but_strong_unit_is_alive_and_a_weak_mean_does_not_kill() -> None:
    activations = np.zeros((1000, 4), np.float32)
    activations[:, 0] = 1.0
    activations[:20, 1] = 0.2  # on 2 % of the samples: its mean of 0.004 would look dead
    activations[:5, 2] = 1e3  # on 0.5 %: dead, however strong
    extrema = find_extrema(stats_of({"h": activations}))
    assert indices(extrema.dead["h"]) == [2, 3]
    assert indices(find_extrema(stats_of({"h": activations}), dead_below=0.005).dead["h"]) == [3]
    assert indices(find_extrema(stats_of({"h": activations}), dead_below=0.1).dead["h"]) == [1, 2, 3]


def test_active_above_reads_smooth_activations() -> None:
    activations = {"h": jax.nn.gelu(jnp.array([[-3.0, 1.0], [-2.5, 2.0]]))}
    empty = init_activation_stats(activations)
    assert indices(find_extrema(update_activation_stats(empty, activations)).dead["h"]) == []
    assert indices(find_extrema(update_activation_stats(empty, activations, active_above=0.05)).dead["h"]) == [0]


def test_bounded_layers_are_read_against_their_bound() -> None:
    tanh = np.array([[0.001, 0.5, -0.999, 0.999], [-0.001, -0.5, 0.999, 0.999]], np.float32)
    extrema = find_extrema(stats_of({"h": tanh}, bounded=True))
    assert indices(extrema.dead["h"]) == [0] and indices(extrema.saturated["h"]) == [2, 3]
    # The same activations of an unbounded layer: always active, and none far above the others.
    unbounded = find_extrema(stats_of({"h": tanh}))
    assert indices(unbounded.dead["h"]) == [] and indices(unbounded.saturated["h"]) == []
    mixed = find_extrema(stats_of({"a": tanh, "b": tanh}, bounded={"b": True}))
    assert indices(mixed.dead["a"]) == [] and indices(mixed.dead["b"]) == [0]


def test_the_robust_score_by_hand() -> None:
    # Magnitudes 1, 2, 3, 4, 5 and x: median (3 + 4) / 2 = 3.5; deviations .5 .5 1.5 1.5 2.5 and x - 3.5 > 2.5, so the
    # MAD is 1.5 and sigma 2.2239. The limit is 3.5 + z * 2.2239 with z the normal quantile.
    for quantile in (0.9, 0.99, 0.999):
        limit = 3.5 + statistics.NormalDist().inv_cdf(quantile) * 1.4826 * 1.5
        for x, found in ((limit * 0.999, []), (limit * 1.001, [5])):
            extrema = find_extrema(stats_of(with_means([1, 2, 3, 4, 5, x])), saturated_above=quantile)
            assert indices(extrema.saturated["layer"]) == found


def test_dead_units_do_not_move_the_middle_and_are_never_saturated() -> None:
    living = [1.0, 1.1, 0.9, 1.2, 0.8, 4.0]
    extrema = find_extrema(stats_of(with_means([0.0] * 50 + living)))
    assert indices(extrema.dead["layer"]) == list(range(50))
    assert indices(extrema.saturated["layer"]) == [55]


def test_scale_of_a_layer_does_not_matter() -> None:
    magnitudes = np.abs(np.random.default_rng(1).normal(1, 0.3, 64)).astype(np.float32)
    magnitudes[7] = 9
    found = [
        indices(find_extrema(stats_of(with_means(list(magnitudes * s)))).saturated["layer"]) for s in (1.0, 1e-4, 1e4)
    ]
    assert 7 in found[0] and found[0] == found[1] == found[2]


def test_agreeing_units_fall_back_to_the_mean_deviation() -> None:
    # Seven equal and one higher: MAD 0; mean deviation 9 / 8, sigma 1.2533 * 1.125 = 1.41, z = 9 / 1.41 = 6.4.
    assert indices(find_extrema(stats_of(with_means([1.0] * 7 + [10.0]))).saturated["layer"]) == [7]
    # z does not depend on how high: with n units it is n / 1.2533, so four (z = 3.19) suffice and two (z = 0.8) do not.
    assert indices(find_extrema(stats_of(with_means([1.0] * 3 + [1.5]))).saturated["layer"]) == [3]
    assert indices(find_extrema(stats_of(with_means([1.0, 1.5]))).saturated["layer"]) == []


@pytest.mark.parametrize(
    "magnitudes", [[1.0] * 6, [1.0, 1.0000001, 1.0, 1.0], [0.0] * 6, [5.0], [0.0, 5.0], [1.0, 9.0]]
)
def test_equal_few_or_no_living_units_are_not_saturated(magnitudes: list[float]) -> None:
    assert indices(find_extrema(stats_of(with_means(magnitudes))).saturated["layer"]) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, 30.0]), min_size=9, max_size=9))
def test_the_score_against_numpy(magnitudes: list[float]) -> None:
    values = np.array(magnitudes)
    living = values > 0
    expected = np.zeros(9, bool)
    if living.any():
        deviation = np.abs(values - np.median(values[living]))
        sigma = 1.4826 * np.median(deviation[living]) or 1.2533 * deviation[living].mean()
        if sigma:
            score = (values - np.median(values[living])) / sigma
            if (np.abs(score - 2.3263479) < 1e-3).any():
                return  # on the limit, where rounding decides
            expected = living & (score > 2.3263479)
    extrema = find_extrema(stats_of(with_means(magnitudes)))
    assert extrema.saturated["layer"].tolist() == expected.tolist()
    assert extrema.dead["layer"].tolist() == (~living).tolist()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_batch_with_non_finite_activations_changes_nothing(poison: float) -> None:
    good = {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 2))}
    stats = update_activation_stats(init_activation_stats(good), good)
    bad = good | {"a": jnp.ones((2, 3)).at[0, 1].set(poison)}
    jax.tree.map(np.testing.assert_array_equal, stats, update_activation_stats(stats, bad))
    empty = {"a": jnp.ones((0, 3)), "b": jnp.ones((0, 2))}
    jax.tree.map(np.testing.assert_array_equal, stats, update_activation_stats(stats, empty))


def test_scan_jit_and_vmap_keep_the_structure() -> None:
    batches = {"a": jnp.asarray(np.random.default_rng(2).normal(size=(6, 8, 3)).clip(0), jnp.float32)}
    stats = init_activation_stats({"a": batches["a"][0]})
    scanned, _ = jax.lax.scan(lambda s, a: (update_activation_stats(s, a), None), stats, batches)
    looped, traces = stats, []

    @jax.jit
    def step(stats: ActivationStats, activations: dict, decay: jax.Array) -> ActivationStats:
        traces.append(1)
        return update_activation_stats(stats, activations, decay=decay)

    for i in range(6):
        looped = step(looped, {"a": batches["a"][i]}, jnp.float32(0.99))
    assert len(traces) == 1
    assert jax.tree.structure(looped) == jax.tree.structure(stats)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(looped)] == [(x.shape, x.dtype) for x in jax.tree.leaves(stats)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), scanned, looped)
    jitted = jax.jit(find_extrema)(looped)
    assert isinstance(jitted, Extrema)
    jax.tree.map(np.testing.assert_array_equal, jitted, find_extrema(looped))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), looped)
    assert jax.vmap(find_extrema)(stacked).dead["a"].shape == (2, 3)


def test_updates_do_not_sort() -> None:
    activations = {"a": jnp.ones((8, 3))}
    stats = init_activation_stats(activations)
    assert "sort" not in jax.jit(update_activation_stats).lower(stats, activations).as_text()


def test_init_reads_shapes_alone() -> None:
    stats = init_activation_stats({"a": jax.ShapeDtypeStruct((4, 7, 7, 16), jnp.bfloat16)}, bounded={"a": True})
    assert stats.active["a"].shape == (16,) and bool(stats.bounded["a"]) and float(stats.weight) == 0


def test_extrema_over_weighs_by_samples() -> None:
    data = np.random.default_rng(3).normal(size=(107, 6)).astype(np.float32).clip(0)
    data[:, 4] = 0
    data[:2, 5], data[2:, 5] = 1, 0  # active on 2 of 107 samples, all in the first batch
    cuts = [data[:40], data[40:100], data[100:]]
    for below in (2 / 107 - 1e-4, 2 / 107 + 1e-4):
        extrema = extrema_over(lambda batch: {"h": jnp.asarray(batch)}, iter(cuts), dead_below=below)
        assert indices(extrema.dead["h"]) == ([4] if below < 2 / 107 else [4, 5])
    whole = extrema_over(lambda batch: {"h": jnp.asarray(batch)}, [data])
    parts = extrema_over(lambda batch: {"h": jnp.asarray(batch)}, cuts)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    tanh = extrema_over(lambda batch: {"h": jnp.full((len(batch), 2), 0.995)}, cuts, bounded=True)
    assert extrema_counts(tanh) == {"h": {"dead": 0, "saturated": 2}}
    gelu = extrema_over(lambda batch: {"h": jnp.full((len(batch), 2), -0.01)}, cuts, active_above=0.05)
    assert extrema_counts(gelu) == {"h": {"dead": 2, "saturated": 0}}


def test_bad_input_raises() -> None:
    good = {"h": jnp.ones((2, 3))}
    stats = init_activation_stats(good)
    with pytest.raises(ValueError, match=r"activations\['h'\] has shape \(3,\)"):
        init_activation_stats({"h": jnp.ones(3)})
    with pytest.raises(ValueError, match="no layer"):
        init_activation_stats({})
    with pytest.raises(ValueError, match=r"bounded names the layers \['x'\]"):
        init_activation_stats(good, bounded={"x": True})
    with pytest.raises(ValueError, match="layers"):
        update_activation_stats(stats, {"x": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"shape \(2, 4\), the statistics hold 3 units"):
        update_activation_stats(stats, {"h": jnp.ones((2, 4))})
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay="):
            update_activation_stats(stats, good, decay=decay)
    with pytest.raises(ValueError, match="active_above=-1"):
        update_activation_stats(stats, good, active_above=-1)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="dead_below="):
            find_extrema(stats, dead_below=bad)
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="saturated_above="):
            find_extrema(stats, saturated_above=bad)
    with pytest.raises(ValueError, match="loader"):
        extrema_over(lambda batch: good, [])
    with pytest.raises(ValueError, match="active_above=-1"):
        extrema_over(lambda batch: good, [0], active_above=-1)
