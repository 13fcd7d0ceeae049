"""One rate per connection: factors by hand, and the cohorts against a slow account of every connection by name."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_equal, train

import optax_structure as oxs
from optax_structure.state.cohorts import ABSENT, Cohorts, admit, first_cohort, follow
from optax_structure.structure import COMPONENTS, NOT_BORN, Growth, Units, identity_sources

SCAFFOLD, PATCH = COMPONENTS.index("scaffold"), COMPONENTS.index("patch")
PARAMS = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
MASKS = {"kernel": jnp.array([[True, False, True], [True, True, False]]), "bias": jnp.asarray(True)}


def ones(steps: int) -> PyTree:
    return jax.tree.map(lambda p: jnp.ones((steps, *p.shape)), PARAMS)


def grown_by(born: Any, masks: PyTree = MASKS) -> Growth:
    """The record of a change in which connections of the kernel were born: codes, 255 elsewhere."""
    labels = jax.tree.map(lambda _: "scaffold", PARAMS)
    births = {"kernel": jnp.asarray(born, jnp.uint8), "bias": jnp.uint8(NOT_BORN)}
    return Growth(PARAMS, labels, masks, Units(()), {}, identity_sources(PARAMS), births)


def kernel_factors(rule: oxs.ElementRule, params: Any = None, **extra: Any) -> np.ndarray:
    """The factors of a rule on the only kernel of a tree, in one program."""
    tx = oxs.scale_by_connection(rule)

    def update(params: Any, extra: Any) -> Any:
        ones = jax.tree.map(jnp.ones_like, params)
        return tx.update(ones, tx.init(params), params, **extra)[0]

    return np.asarray(jax.jit(update)(params, extra))


def table(age: Any = 0, birth: Any = 0, component: Any = 0) -> oxs.CohortTable:
    """Facts of cohorts, broadcast to each other."""
    age, birth, component = np.broadcast_arrays(age, birth, component)
    return oxs.CohortTable(jnp.asarray(age), jnp.asarray(birth), jnp.asarray(component, jnp.uint8))


# The rules, by hand.


def test_birth_factors() -> None:
    births = np.array([0, 19, 20, 49, 50, 1000])

    def factors() -> tuple[jax.Array, ...]:
        own = oxs.birth_rule(bands=((3, 2.0),), late=0.25, temporal_decay=0.0)
        none = oxs.birth_rule(bands=(), temporal_decay=0.0)
        usual = oxs.birth_rule()
        facts = (
            (usual, table(0, births)),
            (usual, table(100, births)),
            (own, table(7, [2, 3])),
            (none, table(7, births)),
        )
        return tuple(rule.factors(fact) for rule, fact in facts)

    young, aged, own, none = jax.jit(factors)()
    np.testing.assert_allclose(young, [0.1, 0.1, 0.5, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(aged, np.array([0.1, 0.1, 0.5, 0.5, 1.0, 1.0]) * 0.36787944, rtol=1e-6)  # exp(-1)
    np.testing.assert_array_equal(own, [2.0, 0.25])
    np.testing.assert_array_equal(none, 1.0)


def test_strength_factors_on_and_beside_the_thresholds() -> None:
    weights = jnp.array([[0.625, -0.625, 0.5, -0.5], [0.25, 0.125, -0.0625, 0.0]])
    factors = kernel_factors(oxs.strength_rule(strong=0.5, weak=0.125), weights)
    np.testing.assert_array_equal(factors, [[0.5, 0.5, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0]])
    # A fan-in of 2 * 8 = 16 makes four times as much of every weight.
    wide = jnp.zeros((2, 8, 2)).at[0, 0].set(jnp.array([0.15625, 0.125])).at[1, 7].set(jnp.array([0.03125, 0.015625]))
    factors = kernel_factors(oxs.strength_rule(strong=0.5, weak=0.125, relative_to="fan_in"), wide)
    np.testing.assert_array_equal([factors[0, 0], factors[1, 7], factors[0, 1]], [[0.5, 1.0], [1.0, 2.0], [2.0, 2.0]])


def test_strength_has_nothing_to_say_of_vectors() -> None:
    tx = oxs.scale_by_connection(oxs.strength_rule(), oxs.component_rule(scaffold=0.25))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["bias"], 0.25)
    np.testing.assert_array_equal(updates["kernel"], 0.5)  # weak: 2 * 0.25


@pytest.mark.parametrize(
    ("depths", "bands"),
    [
        # x = d / (D - 1): 0, 1/3, 2/3, 1. Neither third is early nor late: it takes less than 1/3, more than 2/3.
        ([0, 1, 2, 3], "cmmf"),
        ([0, 1, 2, 3, 4], "ccmff"),
        ([0, 0, 1, 1], "ccff"),
        ([0, 1, 2], "cmf"),
        ([0], "m"),
    ],
)
def test_scale_bands_and_strength(depths: list[int], bands: str) -> None:
    params = [jnp.array([[0.75, 0.5, 0.25, 0.0625]])] * len(depths)
    tx = oxs.scale_by_connection(oxs.scale_rule(depths, coarse=0.125, fine=8.0))
    grads = jax.tree.map(jnp.ones_like, params)
    updates = jax.jit(lambda params: tx.update(grads, tx.init(params), params)[0])(params)
    rows = {"c": [0.125, 1.0, 1.0, 8.0], "m": [1.0, 1.0, 1.0, 8.0], "f": [8.0, 8.0, 8.0, 8.0]}
    np.testing.assert_array_equal(np.concatenate(updates), [rows[band] for band in bands])
    # The same through a function of params.
    by_function = oxs.scale_by_connection(oxs.scale_rule(lambda _: depths, coarse=0.125, fine=8.0))
    assert_equal(by_function.update(grads, by_function.init(params), params)[0], updates)


def test_gradient_factors_on_and_beside_the_thresholds() -> None:
    # g = sqrt: 2, 1 (on the threshold), 0.5, 0.0625 (on it), 0.03125, 0 (never observed), NaN.
    squares = jnp.array([[4.0, 1.0, 0.25, 0.0625**2, 0.03125**2, 0.0, jnp.nan]])
    factors = kernel_factors(oxs.gradient_rule(low=0.0625), jnp.ones((1, 7)), second_moment=squares)
    np.testing.assert_array_equal(factors, [[0.5, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]])


def conv_net() -> tuple[PyTree, Units]:
    """A 1x1 convolution 1 -> 2, flattened at three positions, read by a dense layer of one unit."""
    params = {"conv": {"kernel": jnp.ones((1, 1, 1, 2))}, "head": {"kernel": jnp.ones((6, 1))}}
    return params, oxs.conv_chain(params, ["conv"], ["head"], positions=3)


def test_extrema_of_both_ends_and_behind_a_flatten() -> None:
    params, units = conv_net()
    tx = oxs.scale_by_connection(oxs.extrema_rule(units, boost=3.0))

    def factors(dead: dict[str, Any], saturated: dict[str, Any]) -> list[list[float]]:
        extrema = oxs.Extrema(jax.tree.map(jnp.asarray, dead), jax.tree.map(jnp.asarray, saturated))
        updates, _ = jax.jit(lambda extrema: tx.update(params, tx.init(params), extrema=extrema))(extrema)
        return [leaf.ravel().tolist() for leaf in jax.tree.leaves(updates)]

    none, second = np.zeros(2, bool), np.array([False, True])
    # Row r * 2 + unit of the dense kernel reads the channel `unit` at position r.
    assert factors({"conv": none}, {"conv": second}) == [[1.0, 3.0], [1.0, 3.0, 1.0, 3.0, 1.0, 3.0]]
    # A nearness between, the larger of two ends, and a layer that extrema leave out.
    near = {"conv": np.array([0.25, 0.0], np.float32), "head": np.array([0.125], np.float32)}
    assert factors(near, {"conv": none}) == [[1.5, 1.0], [1.5, 1.25, 1.5, 1.25, 1.5, 1.25]]
    assert factors({"elsewhere": none}, {}) == [[1.0, 1.0], [1.0] * 6]


def test_extrema_of_another_size_are_named() -> None:
    params, units = conv_net()
    tx = oxs.scale_by_connection(oxs.extrema_rule(units))
    with pytest.raises(ValueError, match=r"extrema has \(3,\) units for 'conv', but axis 3 of 'conv/kernel' has 2"):
        tx.update(params, tx.init(params), extrema=oxs.Extrema({"conv": jnp.zeros(3, bool)}, {}))


def test_a_rule_knows_its_kernel_under_per_leaf() -> None:
    params, units = conv_net()
    tx = oxs.per_leaf(oxs.scale_by_connection(oxs.extrema_rule(units)))
    extrema = oxs.Extrema({"conv": jnp.array([False, True])}, {})
    updates, _ = tx.update(params, tx.init(params), params, extrema=extrema)
    assert updates["conv"]["kernel"].ravel().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (oxs.strength_rule(), r"scale_by_connection\(strength_rule.*params: call tx\.update\(grads, state, params\)"),
        (oxs.gradient_rule(), r"gradient_rule\(\.\.\.\).*adam, adamw, lamb, rmsprop.*second_moment=\.\.\."),
        (oxs.extrema_rule(Units(())), r"scale_by_connection\(extrema_rule\(\.\.\.\)\) needs extrema="),
    ],
)
def test_what_a_rule_reads_is_asked_for_unless_it_is_optional(rule: oxs.ElementRule, message: str) -> None:
    tx = oxs.scale_by_connection(rule)
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, tx.init(PARAMS))
    optional = oxs.scale_by_connection(oxs.optional_rule(rule))
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    assert_equal(optional.update(grads, optional.init(PARAMS))[0], grads)


def test_rules_of_cohorts_and_of_connections_multiply() -> None:
    tx = oxs.sparse(
        oxs.scale_by_connection(
            oxs.component_rule(scaffold=0.5),
            oxs.strength_rule(),
            oxs.age_rule(lambda age: 1.0 + age),
            oxs.strength_rule(),
        ),
        MASKS,
    )
    params = {"kernel": jnp.where(MASKS["kernel"], 0.75, 0.0).at[0, 0].set(0.25), "bias": jnp.zeros(3)}
    updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(params), params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, params)
    # 0.5 * 2 everywhere, a quarter of it where |w| = 0.75, and nothing off the mask though |w| = 0 is weak.
    np.testing.assert_array_equal(updates["kernel"], [[1.0, 0.0, 0.25], [0.25, 0.25, 0.0]])


def test_a_rule_of_ones_own_with_a_tree_of_its_own() -> None:
    def factors(kernel: oxs.Kernel) -> jax.Array | None:
        return jnp.asarray([[kernel.said], [float(len(kernel.path))]]) if kernel.said else None

    params = {"one": jnp.ones((2, 2)), "three": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    rule = oxs.ElementRule("own", factors, (), {"one": 0.5, "three": 0.0, "bias": 4.0})
    tx = optax.partition(
        {"a": oxs.scale_by_connection(rule), "b": optax.identity()}, {"one": "a", "three": "b", "bias": "a"}
    )
    updates, _ = tx.update(params, tx.init(params))
    assert updates["one"].tolist() == [[0.5, 0.5], [3.0, 3.0]]
    assert updates["three"].tolist() == [[1.0, 1.0], [1.0, 1.0]] and updates["bias"].tolist() == [1.0, 1.0]


def test_all_tables_cost_one_look_up() -> None:
    rules = (oxs.component_rule(patch=2.0), oxs.birth_rule(), oxs.age_rule(lambda age: 1.0 / (1.0 + age)))
    params = jnp.ones((5, 7))

    def look_ups(*rules: Any) -> int:
        tx = oxs.scale_by_connection(*rules)
        jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        return sum(eqn.primitive.name == "gather" and eqn.outvars[0].aval.shape == (5, 7) for eqn in jaxpr.eqns)

    assert look_ups() == look_ups(*rules) == look_ups(*rules, oxs.strength_rule()) == 1


def test_component_factors() -> None:
    rule = oxs.component_rule(scaffold=0.25, new=0.0)
    none = jnp.zeros(256, jnp.int32)
    by_code = rule.factors(oxs.CohortTable(none, none, jnp.arange(256, dtype=jnp.uint8) % len(COMPONENTS)))
    expected = {"scaffold": 0.25, "patch": 1.0, "new": 0.0, "neck": 1.0, "adapter": 1.0, "pretrained": 1.0}
    assert by_code[: len(COMPONENTS)].tolist() == [expected[name] for name in COMPONENTS]


def test_age_factors_by_step() -> None:
    tx = oxs.scale_by_connection_age(lambda age: 0.5**age)
    updates = jax.jit(functools.partial(train, tx))(PARAMS, ones(3)).updates
    np.testing.assert_array_equal(updates["kernel"][:, 0, 0], [1.0, 0.5, 0.25])
    np.testing.assert_array_equal(updates["bias"][:, 0], [1.0, 0.5, 0.25])


def test_factors_of_all_rules_multiply() -> None:
    tx = oxs.scale_by_connection(
        oxs.component_rule(scaffold=0.5), oxs.age_rule(lambda age: 4.0 - age), oxs.age_rule(lambda age: 1.0 + age)
    )
    updates = train(tx, PARAMS, ones(3)).updates
    np.testing.assert_array_equal(updates["kernel"][:, 1, 2], [2.0, 3.0, 3.0])  # (4, 3, 2) * (1, 2, 3) / 2


def test_a_patch_learns_faster_than_the_scaffold_around_it() -> None:
    tx = oxs.sparse(oxs.scale_by_connection(oxs.component_rule(scaffold=0.125, patch=0.5)), MASKS)
    state = tx.init(PARAMS)
    full = {"kernel": jnp.ones((2, 3), bool), "bias": jnp.asarray(True)}
    growth = grown_by([[NOT_BORN, PATCH, NOT_BORN], [NOT_BORN, NOT_BORN, SCAFFOLD]], full)
    state = oxs.transfer_state(tx, state, PARAMS, tx, PARAMS, growth=growth)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    np.testing.assert_array_equal(updates["kernel"], [[0.125, 0.5, 0.125], [0.125, 0.125, 0.125]])
    np.testing.assert_array_equal(updates["bias"], 0.125)


def test_connections_born_by_a_growth_action_warm_up_from_there() -> None:
    tx = oxs.sparse(oxs.scale_by_connection_age(optax.linear_schedule(0.0, 1.0, 4)), MASKS)
    update = jax.jit(tx.update)
    state, grads = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(3):
        _, state = update(grads, state, PARAMS)
    moved = {"kernel": MASKS["kernel"].at[0, 1].set(True).at[0, 0].set(False), "bias": jnp.asarray(True)}
    growth = grown_by([[NOT_BORN, SCAFFOLD, NOT_BORN], [NOT_BORN] * 3], moved)
    state = oxs.transfer_state(tx, state, PARAMS, tx, PARAMS, growth=growth)
    seen = []
    for _ in range(3):
        updates, state = update(grads, state, PARAMS)
        seen.append(updates["kernel"].ravel().tolist())
    # Born now: 0, 1/4, 1/2. There before: 3/4, 1, 1. Gone or never there: 0.
    assert [row[1] for row in seen] == [0.0, 0.25, 0.5]
    assert [row[2] for row in seen] == [0.75, 1.0, 1.0]
    assert [row[0] for row in seen] == [row[5] for row in seen] == [0.0, 0.0, 0.0]


# Births inside the step.


def test_masks_changed_enters_births_without_a_retrace() -> None:
    tx = oxs.sparse(oxs.scale_by_connection_age(lambda age: 1.0 + age), MASKS)
    traces = []

    @jax.jit
    def step(state: Any, masks: PyTree, changed: jax.Array) -> Any:
        traces.append(None)
        state = state._replace(masks=state.masks._replace(masks=masks))
        return tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS, masks_changed=changed)

    moved = {"kernel": jnp.array([[True, True, False], [True, True, False]]), "bias": jnp.asarray(True)}
    back = {"kernel": jnp.array([[True, True, True], [False, True, False]]), "bias": jnp.asarray(True)}
    state, rows = tx.init(PARAMS), []
    for masks, changed in [(MASKS, False), (MASKS, False), (moved, True), (moved, False), (back, True), (back, False)]:
        updates, state = step(state, masks, jnp.asarray(changed))
        rows.append(updates["kernel"].ravel().tolist())
    assert rows == [
        [1.0, 0.0, 1.0, 1.0, 1.0, 0.0],
        [2.0, 0.0, 2.0, 2.0, 2.0, 0.0],
        [3.0, 1.0, 0.0, 3.0, 3.0, 0.0],
        [4.0, 2.0, 0.0, 4.0, 4.0, 0.0],
        [5.0, 3.0, 1.0, 0.0, 5.0, 0.0],  # a connection that comes back is born again
        [6.0, 4.0, 2.0, 0.0, 6.0, 0.0],
    ]
    assert len(traces) == 1


def test_masks_changed_needs_masks() -> None:
    tx = oxs.scale_by_connection()
    with pytest.raises(ValueError, match=r"masks=.*tx\.update\(grads, state, params, masks=\.\.\.\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, masks_changed=jnp.asarray(True))


def test_absent_connections_get_exactly_zero() -> None:
    tx = oxs.scale_by_connection()
    poisoned = jax.tree.map(lambda p, m: jnp.where(m, 1.0, jnp.nan) + p, PARAMS, MASKS)
    updates, state = tx.update(poisoned, tx.init(PARAMS), masks=MASKS, masks_changed=True)
    np.testing.assert_array_equal(updates["kernel"], [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    np.testing.assert_array_equal(state.cohort["kernel"] == ABSENT, ~MASKS["kernel"])


def test_one_byte_a_connection_and_two_tables() -> None:
    state = oxs.scale_by_connection().init({"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4), "scale": jnp.zeros(())})
    assert [leaf.nbytes for leaf in jax.tree.leaves(state.cohort)] == [1, 32, 1]
    assert (state.birth.shape, state.component.shape) == ((256,), (256,))


# What is known of connections.


def test_births_ages_and_components_of_a_run() -> None:
    born_late = oxs.birth_rule(((2, 0.25),), late=4.0, temporal_decay=0.0)
    inner = optax.chain(optax.scale(1.0), oxs.scale_by_connection(born_late))
    tx = oxs.sparse(optax.MultiSteps(inner, 1).gradient_transformation(), MASKS)
    grown = {"kernel": jnp.array([[True, True, True], [True, True, False]]), "bias": jnp.asarray(True)}

    state = jax.jit(lambda: train(tx, PARAMS, ones(3)).state)()
    growth = grown_by([[NOT_BORN, PATCH, NOT_BORN], [NOT_BORN] * 3], grown)
    state = oxs.transfer_state(tx, state, PARAMS, tx, PARAMS, growth=growth)

    masked = {"kernel": jnp.ones((2, 3), bool).at[0, 0].set(False), "bias": True}
    queries = jax.jit(lambda s: (oxs.connection_ages(s), oxs.connection_components(s), oxs.connection_ages(s, masked)))
    ages, components, fewer = jax.device_get(queries(state))
    assert ages["kernel"].tolist() == [[3, 0, 3], [3, 3, -1]] and int(ages["bias"]) == 3
    assert components["kernel"].tolist() == [[0, PATCH, 0], [0, 0, 255]]
    assert fewer["kernel"].tolist() == [[-1, 0, 3], [3, 3, -1]] and fewer["kernel"].dtype == np.int32
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    np.testing.assert_array_equal(updates["kernel"], [[0.25, 4.0, 0.25], [0.25, 0.25, 0.0]])


def test_ages_under_per_leaf() -> None:
    tx = oxs.per_leaf(optax.chain(optax.trace(0.9), oxs.scale_by_connection()))
    state = train(tx, PARAMS, ones(2)).state
    assert oxs.connection_ages(state)["kernel"].tolist() == [[2, 2, 2], [2, 2, 2]]


@pytest.mark.parametrize("count", [0, 2])
def test_ages_of_no_state_or_several(count: int) -> None:
    tx = optax.chain(optax.adam(0.1), *[oxs.scale_by_connection()] * count)
    for query in (oxs.connection_ages, oxs.connection_components):
        with pytest.raises(ValueError, match=f"holds {count} scale_by_connection states"):
            query(tx.init(PARAMS))


def test_groups_of_a_partition_keep_their_own_cohorts() -> None:
    tx = oxs.scale_by_connection_age(lambda age: 1.0 + age)
    params, masks = {"one": PARAMS, "two": PARAMS}, {"one": MASKS, "two": MASKS}
    grouped = oxs.sparse(optax.partition({"one": tx, "two": optax.identity()}, {"one": "one", "two": "two"}), masks)
    grads = jax.tree.map(lambda p: jnp.ones((2, *p.shape)), params)
    updates = train(grouped, params, grads).updates
    np.testing.assert_array_equal(updates["one"]["kernel"][1], [[2.0, 0.0, 2.0], [2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(updates["two"]["kernel"][1], [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oxs.component_rule(patch=-0.5), r"patch=-0\.5"),
        (
            lambda: oxs.component_rule(backbone=0.5),
            r"component_rule\(backbone=\.\.\.\): components are scaffold",
        ),
        (lambda: oxs.age_rule(0.5), r"schedule=0\.5"),
        (lambda: oxs.birth_rule(((50, 0.5), (20, 0.1))), r"bands\[1\] end=20 must lie in \[50"),
        (lambda: oxs.birth_rule(((20, -0.5),)), r"bands\[0\] factor=-0\.5"),
        (lambda: oxs.birth_rule(late=-1.0), r"late=-1\.0"),
        (lambda: oxs.birth_rule(temporal_decay=-1.0), r"temporal_decay=-1\.0"),
        (lambda: oxs.strength_rule(strong=0.05), r"strong=0\.05 must lie in \[0\.1"),
        (lambda: oxs.strength_rule(weak=-0.05), r"weak=-0\.05"),
        (lambda: oxs.strength_rule(strong_factor=-1.0), r"strong_factor=-1\.0"),
        (lambda: oxs.strength_rule(weak_factor=-1.0), r"weak_factor=-1\.0"),
        (lambda: oxs.strength_rule(relative_to="fan_out"), r"relative_to='fan_out' must be 'one' or 'fan_in'"),
        (lambda: oxs.scale_rule([0, 1], coarse=-1.0), r"coarse=-1\.0"),
        (lambda: oxs.scale_rule([0, 1], medium=-1.0), r"medium=-1\.0"),
        (lambda: oxs.scale_rule([0, 1], fine=-1.0), r"fine=-1\.0"),
        (lambda: oxs.scale_rule([0, -1]), r"depths must be >= 0, got \[-1, 0\]"),
        (lambda: oxs.scale_rule([0, 1], strong=0.05), r"strong=0\.05"),
        (lambda: oxs.scale_rule([0, 1], relative_to="all"), "relative_to='all'"),
        (lambda: oxs.gradient_rule(high=0.001), r"high=0\.001 must lie in \[0\.01"),
        (lambda: oxs.gradient_rule(low=-0.1), r"low=-0\.1"),
        (lambda: oxs.gradient_rule(high_factor=-1.0), r"high_factor=-1\.0"),
        (lambda: oxs.gradient_rule(low_factor=-1.0), r"low_factor=-1\.0"),
        (lambda: oxs.extrema_rule(Units(()), boost=-1.0), r"boost=-1\.0"),
        (lambda: oxs.extrema_rule(["hidden"]), r"units=\['hidden'\] must be Units"),
        (lambda: oxs.optional_rule(oxs.birth_rule()), r"optional_rule takes a rule that reads something"),
        (lambda: oxs.scale_by_connection(lambda age: age), r"takes rules such as age_rule\(\.\.\.\), got <function"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# The cohorts over a thousand events.


class Account:
    """Every present connection by name -> its cohort; a cohort is its birth and component. At most 255 live."""

    def __init__(self, present: set[int]):
        self.cohort_of = dict.fromkeys(present, 0)
        self.cohorts = {0: (0, SCAFFOLD)}
        self.given = 1
        self.merges = 0

    def leave(self, mask: np.ndarray) -> None:
        self.cohort_of = {name: cohort for name, cohort in self.cohort_of.items() if mask[name]}

    def enter(self, names: list[int], now: int, component: int) -> None:
        if not names:
            return
        living = set(self.cohort_of.values())
        if self.given >= 255 and len(living) == 255:
            by_component = {
                code: sorted((self.cohorts[c][0], c) for c in living if self.cohorts[c][1] == code)
                for code in range(len(COMPONENTS))
            }
            pairs = [(pair[1][0], code) for code, pair in by_component.items() if len(pair) > 1]
            (_, older), (_, younger) = by_component[min(pairs)[1]][:2]
            self.cohort_of = {n: older if c == younger else c for n, c in self.cohort_of.items()}
            self.merges += 1
        new, self.given = max(self.cohorts) + 1, self.given + 1
        self.cohorts[new] = (now, component)
        self.cohort_of.update(dict.fromkeys(names, new))

    def table(self, size: int) -> np.ndarray:
        """(birth, component) of every connection, (-1, -1) where absent."""
        rows = np.full((size, 2), -1)
        for name, cohort in self.cohort_of.items():
            rows[name] = self.cohorts[cohort]
        return rows


def events(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks after every event, and the codes of connections that a growth action brought in before it."""
    rng = np.random.default_rng(seed)
    mask = rng.random(size) < 0.6
    masks, born = np.zeros((count, size), bool), np.full((count, size), NOT_BORN, np.uint8)
    for event in range(count):
        if event:
            mask = mask.copy()
            mask[rng.choice(np.flatnonzero(mask), 2, replace=False)] = False
            rewired, patch = np.split(rng.choice(np.flatnonzero(~mask), 2, replace=False), 2)
            mask[rewired] = mask[patch] = True
            born[event, patch] = PATCH if event % 3 == 0 else NOT_BORN
        masks[event] = mask
    return masks, born


def test_a_thousand_events_against_an_account_of_every_connection() -> None:
    shapes, count = {"a": (20, 22), "b": (23, 20)}, 1_100
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    masks, born = events(count, sum(sizes), seed=0)

    def tree(flat: jax.Array) -> PyTree:
        parts = jnp.split(flat, [sizes[0]])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def event(cohorts: Cohorts, now: Any) -> Any:
        mask, codes = now
        cohorts = cohorts._replace(count=cohorts.count + 1)
        cohorts = follow(admit(cohorts, tree(codes)), tree(mask))
        ids = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(cohorts.cohort)]).astype(jnp.int32)
        facts = jnp.stack([cohorts.birth[ids], cohorts.component[ids].astype(jnp.int32)], axis=1)
        return cohorts, jnp.where((ids == ABSENT)[:, None], -1, facts)

    start = first_cohort({name: jnp.zeros(shape) for name, shape in shapes.items()})
    last, seen = jax.jit(lambda start: jax.lax.scan(event, start, (masks, born)))(start)
    seen = np.asarray(seen)

    account = Account(set(np.flatnonzero(masks[0]).tolist()))
    truth = np.zeros(masks.shape[1], int)  # when every connection was really born
    for index in range(1, count):
        now = index + 1
        truth[(masks[index] & ~masks[index - 1]) | (born[index] == PATCH)] = now
        # A growth action brings its connections in before the rewiring that drops others is followed.
        account.enter(np.flatnonzero(born[index] == PATCH).tolist(), now, PATCH)
        account.leave(masks[index])
        rewired = masks[index] & ~np.isin(np.arange(masks.shape[1]), list(account.cohort_of))
        account.enter(np.flatnonzero(rewired).tolist(), now, SCAFFOLD)
        np.testing.assert_array_equal(seen[index], account.table(masks.shape[1]), err_msg=f"event {index}")
        # Merging makes connections older than they are, never younger, and leaves the youngest 200 cohorts alone.
        births, born_at = seen[index, masks[index], 0], truth[masks[index]]
        youngest = born_at >= np.unique(born_at)[-200:][0]
        assert (births <= born_at).all() and (births == born_at)[youngest].all(), f"event {index}"
    assert account.given > 1_000 and account.merges > 300, "the events were to use every id up"
    assert int(last.used) == 255
    # Merging made no patch of scaffold and no scaffold of a patch: each component is that of the connection's birth.
    births, components = seen[-1].T
    assert set(components[masks[-1]]) == {SCAFFOLD, PATCH} and births.max() == count


def test_a_merge_keeps_the_component_and_the_older_birth() -> None:
    # 255 living cohorts of one connection each: born at 0..254, the first two of different components.
    size = 256
    cohorts = first_cohort({"k": jnp.zeros((1, size))})._replace(
        cohort={"k": jnp.asarray([[*range(255), ABSENT]], jnp.uint8)},
        birth=jnp.arange(256, dtype=jnp.int32),
        component=jnp.zeros(256, jnp.uint8).at[0].set(PATCH),
        used=jnp.asarray(255),
        count=jnp.asarray(300),
        synced=jnp.asarray(True),
    )
    after = jax.jit(follow)(cohorts, {"k": jnp.ones((1, size), bool)})
    ids = np.asarray(after.cohort["k"][0], np.int32)
    births, components = np.asarray(after.birth)[ids], np.asarray(after.component)[ids]
    # Cohort 0 is a lone patch; of the scaffold, 2 joins 1.
    np.testing.assert_array_equal(births, [0, 1, 1, *range(3, 255), 300])
    np.testing.assert_array_equal(components, [PATCH, *[SCAFFOLD] * 255])
    assert ids[1] == ids[2] and len(set(ids.tolist())) == 255


def test_an_id_without_members_is_used_again() -> None:
    tx = oxs.scale_by_connection()
    state = tx.init(PARAMS)
    masks = [MASKS, {"kernel": ~MASKS["kernel"], "bias": jnp.asarray(True)}]
    update = jax.jit(lambda state, masks: tx.update(PARAMS, state, masks=masks, masks_changed=True)[1])
    for event in range(300):
        state = update(state, masks[event % 2])
    present = state.cohort["kernel"][masks[1]["kernel"]]
    assert len(set(present.tolist())) == 1
    assert int(state.birth[present[0]]) == 299
    assert_equal(state.cohort["kernel"] == ABSENT, masks[0]["kernel"])
