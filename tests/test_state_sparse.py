"""Optimizer state through changes of masks: connections that come and go, cohorts, resets, placement, retraces."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_structure as oxs
from optax_structure.growth import add_connections, add_patches, embed_patches, insert_layer, prune_connections, widen
from optax_structure.state import moving
from optax_structure.state.cohorts import Cohorts
from optax_structure.structure import COMPONENTS, Growth, Units

KEY = jax.random.key(0)
NET = {
    "hidden": {"kernel": jax.random.normal(KEY, (6, 8)), "bias": jnp.linspace(-0.2, 0.2, 8)},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (8, 4)), "bias": jnp.zeros(4)},
}
LABELS = jax.tree.map(lambda _: "scaffold", NET)
MASKS = oxs.random_masks(jax.random.key(2), NET, 0.4)
PARAMS = oxs.apply_masks(NET, MASKS)
UNITS = oxs.dense_chain(NET, ["hidden", "head"])
KERNELS = ("hidden", "head")


def by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def aged(state: Any, seed: int = 0) -> Any:
    """The state with other floats in it, every one different, and older counts."""
    rng = np.random.default_rng(seed)

    def age(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return leaf + 9 if leaf.dtype == jnp.int32 else leaf

    return jax.tree.map(age, state)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(after, before, err_msg=jax.tree_util.keystr(path), strict=True)


def stepped(tx: Any, state: Any, params: Any, steps: int, **extra: Any) -> Any:
    for step in range(steps):
        grads = jax.tree.map(lambda p, step=step: jax.random.normal(jax.random.key(step + p.size), p.shape), params)
        _, state = tx.update(grads, state, params, **extra)
    return state


# Masks ------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["same_tx", "new_tx"])
def test_new_connections_are_fresh_pruned_ones_lose_their_state_others_stay(same: bool) -> None:
    tx = oxs.sparse(oxs.per_leaf(optax.scale_by_adam()), MASKS)
    state = aged(tx.init(PARAMS))
    pruned = prune_connections(PARAMS, LABELS, MASKS, UNITS, 5)
    grown = add_connections(pruned.params, LABELS, pruned.masks, UNITS, 9, key=KEY)
    new_tx = tx if same else oxs.sparse(oxs.per_leaf(optax.scale_by_adam()), grown.masks)
    after = oxs.transfer_state(tx, state, PARAMS, new_tx, grown.params, growth=grown)
    assert_same(oxs.get_masks(after), grown.masks)
    assert_same(after.inner_state.count, state.inner_state.count)
    for layer in KERNELS:
        old, new = np.asarray(MASKS[layer]["kernel"]), np.asarray(grown.masks[layer]["kernel"])
        born, gone = new & ~old, old & ~new
        assert born.any()
        for field, fresh in (("mu", 0.0), ("nu", None)):
            before = np.asarray(getattr(state.inner_state, field)[layer]["kernel"])
            now = np.asarray(getattr(after.inner_state, field)[layer]["kernel"])
            np.testing.assert_array_equal(now[old == new], before[old == new])
            np.testing.assert_array_equal(now[gone], 0.0)
            expected = before[old & new].mean() if fresh is None else fresh
            np.testing.assert_allclose(now[born], expected, rtol=1e-6)
        assert_same(after.inner_state.nu[layer]["bias"], state.inner_state.nu[layer]["bias"])


def test_new_connections_are_bounded_by_their_gradients() -> None:
    tx = oxs.sparse(optax.scale_by_adam(), MASKS)
    state = aged(tx.init(PARAMS))
    grown = add_connections(PARAMS, LABELS, MASKS, UNITS, 12, key=KEY)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape) ** 3, PARAMS)
    after = oxs.transfer_state(tx, state, PARAMS, tx, grown.params, growth=grown, grads=grads)
    for layer in KERNELS:
        old, new = np.asarray(MASKS[layer]["kernel"]), np.asarray(grown.masks[layer]["kernel"])
        squared = np.square(np.asarray(grads[layer]["kernel"], np.float64))
        born = squared[new & ~old]
        living = np.asarray(state.inner_state.nu[layer]["kernel"], np.float64)[old].mean()
        # mean(nu living) * max(1, g**2 / mean(g living**2)), g**2 being at least the mean of those born together
        expected = living * np.maximum(1.0, np.maximum(born, born.mean()) / squared[old].mean())
        np.testing.assert_allclose(after.inner_state.nu[layer]["kernel"][new & ~old], expected, rtol=1e-5)


def test_a_connection_under_ten_times_the_gradient_starts_no_larger_than_in_a_fresh_optimizer() -> None:
    params, mask = {"kernel": jnp.zeros((8, 8))}, jnp.arange(64).reshape(8, 8) % 2 == 0
    tx = oxs.sparse(optax.adam(1e-3), {"kernel": mask})
    update = jax.jit(tx.update)
    grads = {"kernel": jnp.where(mask, 1.0, 10.0)}
    state = tx.init(params)
    state = state._replace(
        inner_state=(
            optax.ScaleByAdamState(jnp.asarray(5000), {"kernel": mask * 1.0}, {"kernel": mask * 1.0}),
            *state.inner_state[1:],
        )
    )
    grown = add_connections(params, "scaffold", {"kernel": mask}, Units(()), 20, key=KEY)
    state = oxs.transfer_state(tx, state, params, tx, params, growth=grown, grads=grads)
    born = np.asarray(grown.masks["kernel"] & ~mask)
    for _ in range(20):
        updates, state = update(grads, state, params)
        assert np.abs(updates["kernel"])[born].max() <= 1.05e-3  # a fresh Adam's are 1e-3 under a constant gradient


@pytest.mark.parametrize(
    "action", ["embed", "widen", *(pytest.param(name, marks=pytest.mark.slow) for name in ("add", "insert", "patches"))]
)
def test_masks_of_the_growth_win_after_rewiring_too(action: str) -> None:
    def make(labels: Any, masks: Any) -> Any:
        scales = {"scaffold": 0.1, "new": 1.0, "patch": 0.5}
        return oxs.sparse(optax.chain(oxs.per_leaf(optax.scale_by_adam()), oxs.scale_by_label(scales, labels)), masks)

    tx = make(LABELS, MASKS)
    state = aged(tx.init(PARAMS))
    # Rewired since: the state's masks are no longer those that tx was built with.
    rewired = add_connections(
        PARAMS, LABELS, prune_connections(PARAMS, LABELS, MASKS, UNITS, 7).masks, UNITS, 7, key=KEY
    )
    state = oxs.transfer_state(tx, state, PARAMS, tx, rewired.params, growth=rewired)
    params, masks = rewired.params, oxs.get_masks(state)
    grown = {
        "add": lambda: add_connections(params, LABELS, masks, UNITS, 6, key=KEY),
        "embed": lambda: embed_patches(params, LABELS, masks, UNITS, 1, key=KEY, size=3),
        "widen": lambda: widen(params, LABELS, masks, UNITS, "hidden", 2, key=KEY),
        "insert": lambda: insert_layer(params, LABELS, masks, UNITS, "hidden", key=KEY),
        "patches": lambda: add_patches(params, LABELS, masks, UNITS, "hidden", 2, key=KEY, size=3, hidden=2),
    }[action]()
    assert oxs.nonzero(grown.masks) >= oxs.nonzero(masks)
    new_tx = tx if action in ("add", "embed") else make(grown.labels, grown.masks)
    after = oxs.transfer_state(tx, state, params, new_tx, grown.params, growth=grown)
    assert {path: np.shape(m) for path, m in by_path(oxs.get_masks(after)).items()} == {
        path: np.shape(m) for path, m in by_path(grown.masks).items()
    }
    for path, mask in by_path(grown.masks).items():
        np.testing.assert_array_equal(by_path(oxs.get_masks(after))[path], mask)
    _, again = new_tx.update(jax.tree.map(jnp.ones_like, grown.params), after, grown.params)
    assert jax.tree.structure(again) == jax.tree.structure(after)


def test_masks_of_the_growth_win_for_a_leaf_that_starts_again() -> None:
    tx = oxs.sparse(oxs.per_leaf(optax.adam(1e-3)), MASKS)
    grown = add_connections(PARAMS, LABELS, MASKS, UNITS, 9, key=KEY)
    after = oxs.transfer_state(
        tx, aged(tx.init(PARAMS)), PARAMS, tx, grown.params, growth=grown, restart=("hidden/kernel",)
    )
    assert_same(oxs.get_masks(after), grown.masks)


def test_without_a_record_masks_come_from_the_new_transformation() -> None:
    other = oxs.random_masks(jax.random.key(7), NET, 0.4)
    tx, new_tx = oxs.sparse(optax.adam(1e-3), MASKS), oxs.sparse(optax.adam(1e-3), other)
    after = oxs.transfer_state(tx, aged(tx.init(PARAMS)), PARAMS, new_tx, PARAMS)
    assert_same(oxs.get_masks(after), new_tx.init(PARAMS).masks.masks)


def test_a_leaf_that_becomes_dense_has_fresh_connections() -> None:
    tx, dense = oxs.sparse(optax.scale_by_adam(), MASKS), optax.scale_by_adam()
    state = aged(tx.init(PARAMS))
    mask = np.asarray(MASKS["hidden"]["kernel"])
    nu = state.inner_state.nu["hidden"]["kernel"].at[~mask].set(0.0)  # nothing was ever learned off the mask
    state = state._replace(
        inner_state=state.inner_state._replace(
            nu={**state.inner_state.nu, "hidden": {**state.inner_state.nu["hidden"], "kernel": nu}}
        )
    )
    after = oxs.transfer_state(tx, state, PARAMS, dense, PARAMS)
    now = np.asarray(after.nu["hidden"]["kernel"])
    np.testing.assert_array_equal(now[mask], np.asarray(nu)[mask])
    np.testing.assert_allclose(now[~mask], np.asarray(nu)[mask].mean(), rtol=1e-6)  # not 0 beside a mature count
    np.testing.assert_array_equal(after.mu["hidden"]["kernel"][~mask], 0.0)
    assert after.count == state.inner_state.count


def test_a_dense_leaf_that_becomes_sparse_keeps_what_lives() -> None:
    tx, dense = oxs.sparse(optax.scale_by_adam(), MASKS), optax.scale_by_adam()
    state = aged(dense.init(PARAMS))
    after = oxs.transfer_state(dense, state, PARAMS, tx, PARAMS)
    mask = np.asarray(MASKS["head"]["kernel"])
    for field in ("mu", "nu"):
        expected = np.where(mask, getattr(state, field)["head"]["kernel"], 0.0)
        np.testing.assert_array_equal(getattr(after.inner_state, field)["head"]["kernel"], expected)


def test_widened_sparse_rows_hold_state_for_living_connections_only() -> None:
    tx = oxs.sparse(oxs.per_leaf(optax.scale_by_adam()), MASKS)
    state = aged(tx.init(PARAMS))
    grown = widen(PARAMS, LABELS, MASKS, UNITS, "hidden", 3, key=KEY)
    new_tx = oxs.sparse(oxs.per_leaf(optax.scale_by_adam()), grown.masks)
    after = oxs.transfer_state(tx, state, PARAMS, new_tx, grown.params, growth=grown)
    old, new = (np.asarray(s.inner_state.nu["hidden"]["kernel"]) for s in (state, after))
    np.testing.assert_array_equal(new[:, :8], old)
    mask = np.asarray(grown.masks["hidden"]["kernel"])[:, 8:]
    mean = old[np.asarray(MASKS["hidden"]["kernel"])].mean()
    np.testing.assert_allclose(new[:, 8:], np.where(mask, mean, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(after.inner_state.mu["hidden"]["kernel"][:, 8:], 0.0)


def test_masks_of_several_groups_are_put_together() -> None:
    labels = {"hidden": {"kernel": "x", "bias": "x"}, "head": {"kernel": "y", "bias": "z"}}
    groups = {"x": oxs.sparse(optax.adam(1e-3), MASKS), "y": oxs.sparse(optax.lion(1e-3), MASKS), "z": optax.sgd(1.0)}
    for tree in (labels, {"hidden": "x", "head": {"kernel": "y", "bias": "z"}}, {"hidden": "y", "head": "x"}):
        found = oxs.get_masks(optax.partition(groups, tree).init(PARAMS))
        assert_same(found, jax.tree.map(jnp.asarray, MASKS))
    # A subtree that got one label and is in no sparse group has one True for all of it.
    found = oxs.get_masks(optax.partition(groups, {"hidden": "x", "head": "z"}).init(PARAMS))
    assert_same(found, {"hidden": MASKS["hidden"], "head": jnp.asarray(True)})
    with pytest.raises(ValueError, match="no masks in this state"):
        oxs.get_masks(optax.adam(1e-3).init(PARAMS))


# Cohorts ------------------------------------------------------------


def connected(masks: Any, *rules: Any) -> Any:
    return oxs.sparse(optax.chain(oxs.per_leaf(optax.scale_by_adam()), oxs.scale_by_connection(*rules)), masks)


def cohorts_of(state: Any) -> Cohorts:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Cohorts))
    (found,) = [node for node in nodes if isinstance(node, Cohorts)]
    return found


def known(state: Any, layer: str, leaf: str = "kernel") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every entry of a leaf: whether it exists, when it was born, its component."""
    cohorts = cohorts_of(state)
    ids = np.asarray(cohorts.cohort[layer][leaf])
    return (
        ids != 255,
        np.asarray(cohorts.birth)[ids],
        np.asarray(COMPONENTS)[np.minimum(np.asarray(cohorts.component)[ids], 5)],
    )


@pytest.mark.parametrize("same", [True, False], ids=["same_tx", "new_tx"])
def test_births_and_components_are_entered(same: bool) -> None:
    tx = connected(MASKS)
    state = stepped(tx, tx.init(PARAMS), PARAMS, 3)
    pruned = prune_connections(PARAMS, LABELS, MASKS, UNITS, 4)
    state = oxs.transfer_state(tx, state, PARAMS, tx, pruned.params, growth=pruned)
    state = stepped(tx, state, PARAMS, 2)
    grown = embed_patches(pruned.params, LABELS, pruned.masks, UNITS, 2, key=KEY, size=3)
    new_tx = tx if same else connected(grown.masks)
    state = oxs.transfer_state(tx, state, pruned.params, new_tx, grown.params, growth=grown)
    assert cohorts_of(state).count == 5
    some = False
    for layer in KERNELS:
        exists, birth, component = known(state, layer)
        before, now = np.asarray(pruned.masks[layer]["kernel"]), np.asarray(grown.masks[layer]["kernel"])
        np.testing.assert_array_equal(exists, now)
        np.testing.assert_array_equal(birth[before & now], 0)
        np.testing.assert_array_equal(component[before & now], "scaffold")
        np.testing.assert_array_equal(birth[now & ~before], 5)
        np.testing.assert_array_equal(component[now & ~before], "patch")
        some = some or bool((now & ~before).any())
    assert some


def test_growth_before_the_first_step() -> None:
    tx = connected(MASKS)
    grown = add_connections(PARAMS, LABELS, MASKS, UNITS, 9, key=KEY, component="neck")
    state = oxs.transfer_state(tx, tx.init(PARAMS), PARAMS, tx, grown.params, growth=grown)
    for layer in KERNELS:
        exists, birth, component = known(state, layer)
        old, new = np.asarray(MASKS[layer]["kernel"]), np.asarray(grown.masks[layer]["kernel"])
        np.testing.assert_array_equal(exists, new)
        np.testing.assert_array_equal(birth[new], 0)
        np.testing.assert_array_equal(component[old], "scaffold")
        np.testing.assert_array_equal(component[new & ~old], "neck")


def test_a_fresh_leaf_is_born_now_with_the_component_of_its_label() -> None:
    tx = connected(MASKS)
    state = stepped(tx, tx.init(PARAMS), PARAMS, 3)
    for label, expected in (("adapter", "adapter"), ("my_own", "new")):
        grown = insert_layer(PARAMS, LABELS, MASKS, UNITS, "hidden", key=KEY, label=label)
        grown = grown._replace(born=jax.tree.map(lambda _: np.uint8(255), grown.params))  # the label alone says it
        after = oxs.transfer_state(tx, state, PARAMS, connected(grown.masks), grown.params, growth=grown)
        exists, birth, component = known(after, "hidden_next")
        np.testing.assert_array_equal(exists, grown.masks["hidden_next"]["kernel"])
        np.testing.assert_array_equal(birth[exists], 3)
        np.testing.assert_array_equal(component[exists], expected)
        assert known(after, "hidden_next", "bias") == (True, 3, expected)
        for layer in KERNELS:
            assert_same(cohorts_of(after).cohort[layer], cohorts_of(state).cohort[layer])


def test_cohorts_move_with_their_rows() -> None:
    tx = connected(MASKS)
    state = stepped(tx, tx.init(PARAMS), PARAMS, 2)
    patched = embed_patches(PARAMS, LABELS, MASKS, UNITS, 3, key=KEY, size=3)
    state = stepped(tx, oxs.transfer_state(tx, state, PARAMS, tx, patched.params, growth=patched), PARAMS, 2)
    columns = np.array([5, -1, 0, 1, 2, 7], np.int32)  # units 3, 4, 6 are pruned, one is new
    params = {
        "hidden": {"kernel": jnp.zeros((6, 6)), "bias": jnp.zeros(6)},
        "head": {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)},
    }
    old = np.asarray(patched.masks["hidden"]["kernel"])
    mask = np.where(columns >= 0, old[:, columns], np.arange(6)[:, None] % 2 == 0)
    rows = np.where((columns >= 0)[:, None], np.asarray(patched.masks["head"]["kernel"])[columns], True)
    masks = {
        "hidden": {"kernel": jnp.asarray(mask), "bias": jnp.asarray(True)},
        "head": {"kernel": jnp.asarray(rows), "bias": jnp.asarray(True)},
    }
    growth = Growth(
        params,
        LABELS,
        masks,
        UNITS,
        {},
        {"hidden/kernel": (np.arange(6), columns), "hidden/bias": (columns,), "head/kernel": (columns, np.arange(4))},
        jax.tree.map(lambda _: np.uint8(255), params),
    )
    after = oxs.transfer_state(tx, state, PARAMS, connected(masks), params, growth=growth)
    before = known(state, "hidden")
    exists, birth, component = known(after, "hidden")
    np.testing.assert_array_equal(exists, mask)
    stays = mask & (columns >= 0)
    np.testing.assert_array_equal(birth[stays], before[1][:, columns][stays])
    np.testing.assert_array_equal(component[stays], before[2][:, columns][stays])
    seen = set(component[stays])
    np.testing.assert_array_equal(birth[mask & (columns < 0)], 4)
    before = known(state, "head")
    exists, birth, component = known(after, "head")
    np.testing.assert_array_equal(exists, rows)
    stays = rows & (columns >= 0)[:, None]
    np.testing.assert_array_equal(birth[stays], before[1][columns][stays])
    np.testing.assert_array_equal(component[stays], before[2][columns][stays])
    np.testing.assert_array_equal(birth[rows & (columns < 0)[:, None]], 4)
    assert seen | set(component[stays]) == {"scaffold", "patch"}


def test_ids_are_used_again_when_they_run_out() -> None:
    params = {"kernel": jnp.zeros((20, 20))}
    masks = {"kernel": jnp.zeros((20, 20), bool).at[0, 0].set(True)}
    tx = oxs.sparse(oxs.scale_by_connection(), masks)
    state = tx.init(params)
    events = 280  # more than there are ids
    rng = np.random.default_rng(0)
    order = rng.permutation(np.arange(1, 400))
    update = jax.jit(tx.update)
    current = np.zeros(400, bool)
    current[0] = True
    for event in range(events):
        _, state = update(params, state, params)
        current[order[event]] = True
        born = np.full(400, 255, np.uint8)
        born[order[event]] = event % 2  # scaffold and patch in turn
        growth = Growth(
            params,
            {"kernel": "scaffold"},
            {"kernel": jnp.asarray(current.reshape(20, 20))},
            Units(()),
            {},
            {},
            {"kernel": jnp.asarray(born.reshape(20, 20))},
        )
        state = oxs.transfer_state(tx, state, params, tx, params, growth=growth)
    cohorts = cohorts_of(state)
    ids = np.asarray(cohorts.cohort["kernel"]).ravel()
    np.testing.assert_array_equal(ids != 255, current)
    component, birth = np.asarray(cohorts.component)[ids], np.asarray(cohorts.birth)[ids]
    np.testing.assert_array_equal(component[order[:events]], np.arange(events) % 2)
    # The oldest were merged, so their births are rounded down to that of an older one; the young are exact.
    np.testing.assert_array_equal(birth[order[100:events]], np.arange(100, events) + 1)
    assert (birth[order[:events]] <= np.arange(events) + 1).all()


def test_cohorts_of_two_transforms_are_not_joined() -> None:
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    groups = {"x": oxs.scale_by_connection(), "y": oxs.scale_by_connection()}
    two, one = (optax.partition(groups, labels) for labels in ({"a": "x", "b": "y"}, {"a": "x", "b": "x"}))
    with pytest.raises(ValueError, match=r"Cohorts .*two transforms"):
        oxs.transfer_state(two, two.init(params), params, one, params)


# Reset ------------------------------------------------------------


def nowhere() -> Any:
    return jax.tree.map(lambda _: False, PARAMS)


def test_a_whole_leaf_is_reset_with_its_own_counter() -> None:
    tx = connected(MASKS)
    state = stepped(tx, tx.init(PARAMS), PARAMS, 3)
    patched = embed_patches(PARAMS, LABELS, MASKS, UNITS, 2, key=KEY, size=3)
    state = stepped(tx, oxs.transfer_state(tx, state, PARAMS, tx, PARAMS, growth=patched), PARAMS, 2)
    where = nowhere()
    where["hidden"] = {"kernel": True, "bias": True}
    after = oxs.reset_state(tx, state, PARAMS, where)
    before, now = by_path(state.inner_state[0]), by_path(after.inner_state[0])
    for path, value in now.items():
        if "hidden" in path:
            assert not np.any(value)
        else:
            np.testing.assert_array_equal(value, before[path])
    assert_same(oxs.get_masks(after), oxs.get_masks(state))  # those of the growth, not those that tx was built with
    exists, birth, component = known(after, "hidden")
    np.testing.assert_array_equal(exists, patched.masks["hidden"]["kernel"])
    np.testing.assert_array_equal(birth[exists], 5)
    np.testing.assert_array_equal(component[exists], known(state, "hidden")[2][exists])
    assert known(after, "hidden", "bias") == (True, 5, "scaffold")
    assert_same(cohorts_of(after).cohort["head"], cohorts_of(state).cohort["head"])


def test_a_whole_leaf_under_a_shared_counter_is_not_reset() -> None:
    tx = optax.adam(1e-3)
    where = nowhere()
    where["head"]["bias"] = True
    with pytest.raises(ValueError, match=r"ScaleByAdamState\.count.*'head/bias' beside 'head/kernel'.*per_leaf"):
        oxs.reset_state(tx, aged(tx.init(PARAMS)), PARAMS, where)
    everything = jax.tree.map(lambda _: True, PARAMS)
    assert_same(oxs.reset_state(tx, aged(tx.init(PARAMS)), PARAMS, everything), tx.init(PARAMS))


@pytest.mark.parametrize("bounded", [False, True])
def test_units_are_reset_by_their_rows(bounded: bool) -> None:
    tx = optax.scale_by_amsgrad()
    state = aged(tx.init(PARAMS))
    units = jnp.arange(8) % 3 == 0
    where = {"hidden": {"kernel": units[None, :], "bias": units}, "head": {"kernel": units[:, None], "bias": False}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape) ** 3, PARAMS)
    after = oxs.reset_state(tx, state, PARAMS, where, grads=grads if bounded else None)
    assert after.count == state.count
    for path, chosen in by_path(where).items():
        layer, name = path.split("/")
        chosen = np.broadcast_to(chosen, PARAMS[layer][name].shape)
        for field in ("mu", "nu", "nu_max"):
            old, new = (np.asarray(getattr(s, field)[layer][name]) for s in (state, after))
            np.testing.assert_array_equal(new[~chosen], old[~chosen])
            if field == "mu" or not chosen.any():
                np.testing.assert_array_equal(new[chosen], 0.0)
                continue
            expected = np.full(chosen.sum(), old[~chosen].mean(dtype=np.float64))
            if bounded:
                squared = np.square(np.asarray(grads[layer][name], np.float64))
                own = np.maximum(squared[chosen], squared[chosen].mean())
                expected = expected * np.maximum(1.0, own / squared[~chosen].mean())
            np.testing.assert_allclose(new[chosen], expected, rtol=1e-5)


def test_nothing_reset_is_the_identity() -> None:
    tx = connected(MASKS)
    state = stepped(tx, tx.init(PARAMS), PARAMS, 2)
    assert_same(oxs.reset_state(tx, state, PARAMS, nowhere()), state)
    none = jax.tree.map(lambda p: jnp.zeros(p.shape, bool), PARAMS)
    assert_same(oxs.reset_state(tx, state, PARAMS, none), state)


def test_factored_rows_are_reset_when_all_of_them_is() -> None:
    tx, params = optax.adafactor(1e-3, min_dim_size_to_factor=2), {"w": jnp.ones((3, 5))}
    state = aged(tx.init(params))
    where = jnp.zeros((3, 5), bool).at[1].set(True).at[0, 2].set(True)
    after = oxs.reset_state(tx, state, params, {"w": where})
    row = np.asarray(state[0].v_row["w"])
    np.testing.assert_allclose(after[0].v_row["w"], [row[0], row[[0, 2]].mean(), row[2]], rtol=1e-6)
    assert_same(after[0].v_col, state[0].v_col)


def test_a_reset_that_does_not_fit_raises() -> None:
    tx = optax.scale_by_adam()
    where = nowhere()
    where["hidden"]["kernel"] = jnp.ones(5, bool)
    with pytest.raises(ValueError, match=r"where: 'hidden/kernel' has shape \(5,\), its parameter \(6, 8\)"):
        oxs.reset_state(tx, tx.init(PARAMS), PARAMS, where)
    with pytest.raises(ValueError, match="where does not have the structure of params"):
        oxs.reset_state(tx, tx.init(PARAMS), PARAMS, {"hidden": True})


# Placement and precision ------------------------------------------------------------


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    def put(leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "x") if leaf.ndim else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


@pytest.mark.parametrize(
    "action", ["add", *(pytest.param(name, marks=pytest.mark.slow) for name in ("widen", "insert"))]
)
def test_state_is_placed_as_its_parameters(action: str) -> None:
    assert jax.device_count() >= 2
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    params = on_mesh(PARAMS, mesh)
    masks = jax.tree.map(lambda mask: on_mesh(mask, mesh), MASKS)
    tx = connected(masks, oxs.component_rule(new=0.5))
    state = jax.jit(tx.init)(params)
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    grown = {
        "add": lambda: add_connections(params, LABELS, masks, UNITS, 6, key=KEY),
        "widen": lambda: widen(params, LABELS, masks, UNITS, "hidden", 4, key=KEY),
        "insert": lambda: insert_layer(params, LABELS, masks, UNITS, "hidden", key=KEY),
    }[action]()
    new_tx = tx if action == "add" else connected(grown.masks, oxs.component_rule(new=0.5))
    after = oxs.transfer_state(tx, state, params, new_tx, grown.params, growth=grown)
    leaves = by_path(grown.params)
    for tree in (after.inner_state[0].mu, after.inner_state[0].nu, oxs.get_masks(after), cohorts_of(after).cohort):
        for path, value in by_path(tree).items():
            param = leaves[path]
            assert value.sharding.device_set == param.sharding.device_set, path
            if value.shape == param.shape:
                assert value.sharding.is_equivalent_to(param.sharding, value.ndim), path
    # What it says is what one device would say.
    alone = jax.tree.map(np.asarray, (params, state, grown.params, grown.masks, grown.born))
    old_params, old_state, *record = jax.tree.map(jnp.asarray, alone)
    growth = grown._replace(params=record[0], masks=record[1], born=record[2])
    single_tx = connected(growth.masks, oxs.component_rule(new=0.5))
    single = oxs.transfer_state(tx, old_state, old_params, single_tx, growth.params, growth=growth)
    for (path, value), other in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-6, err_msg=jax.tree_util.keystr(path))
    _, on = jax.jit(new_tx.update)(jax.tree.map(jnp.ones_like, grown.params), after, grown.params)
    assert jax.tree.structure(on) == jax.tree.structure(after)


@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_dtypes_of_moments_stay(mu_dtype: Any) -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS) if mu_dtype is None else PARAMS
    tx = oxs.sparse(oxs.per_leaf(optax.scale_by_adam(mu_dtype=mu_dtype)), MASKS)
    state = aged(tx.init(params))
    grown = widen(params, LABELS, MASKS, UNITS, "hidden", 2, key=KEY)
    new_tx = oxs.sparse(oxs.per_leaf(optax.scale_by_adam(mu_dtype=mu_dtype)), grown.masks)
    after = oxs.transfer_state(tx, state, params, new_tx, grown.params, growth=grown)
    for leaf, like in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert leaf.dtype == like.dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(after.inner_state.mu)} == {jnp.dtype(jnp.bfloat16)}
    nu, mask = state.inner_state.nu["hidden"]["kernel"], np.asarray(MASKS["hidden"]["kernel"])
    np.testing.assert_array_equal(after.inner_state.nu["hidden"]["kernel"][:, :8], nu)
    filled = np.asarray(after.inner_state.nu["hidden"]["kernel"][:, 8:], np.float64)
    mean = np.asarray(nu, np.float64)[mask].mean()
    np.testing.assert_allclose(filled[np.asarray(grown.masks["hidden"]["kernel"])[:, 8:]], mean, rtol=2**-7)


# Compilation ------------------------------------------------------------

_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: _compiled.append(name))


def compilations() -> int:
    return sum("backend_compile" in name for name in _compiled)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_second_change_of_masks_compiles_nothing_and_the_step_goes_on(gradients: bool) -> None:
    traces = 0
    tx = oxs.sparse(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            oxs.per_leaf(optax.scale_by_adam()),
            oxs.scale_by_label({"scaffold": 0.1}, LABELS),
            oxs.scale_by_connection(oxs.component_rule(scaffold=0.1, patch=0.5), oxs.age_rule(lambda age: age + 1.0)),
            optax.scale_by_learning_rate(1e-3),
        ),
        MASKS,
    )

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        nonlocal traces
        traces += 1
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    params, grads = jax.tree.map(jnp.copy, PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    params, state = jitted(params, tx.init(PARAMS), grads)
    masks = oxs.get_masks(state)

    def event(params: Any, state: Any, count: int) -> tuple[Any, Any]:
        masks = oxs.get_masks(state)
        pruned = prune_connections(params, LABELS, masks, UNITS, count)
        grown = add_connections(
            pruned.params, LABELS, pruned.masks, UNITS, count + 1, key=jax.random.key(count), component="patch"
        )
        state = oxs.transfer_state(
            tx, state, params, tx, grown.params, growth=grown, grads=grads if gradients else None
        )
        params, after = jitted(grown.params, state, grads)
        # The state was donated; the record that its masks came from was not.
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(grown.masks))
        return params, after

    params, state = event(params, state, 3)
    sizes = (moving.move._cache_size(), moving.move_in_place._cache_size())
    before = compilations()
    for count in (4, 5):
        params, state = event(params, state, count)
    assert compilations() == before
    assert (moving.move._cache_size(), moving.move_in_place._cache_size()) == sizes
    assert traces == 1
    assert oxs.nonzero(oxs.get_masks(state)) == oxs.nonzero(MASKS) + 3
    del masks


def test_compilations_are_counted() -> None:
    before = compilations()
    jax.jit(lambda x: x * 3.25 - 1.5)(jnp.ones(7)).block_until_ready()
    assert compilations() > before


def test_a_transfer_of_a_changed_shape_compiles_its_work_once() -> None:
    tx = oxs.per_leaf(optax.scale_by_adam())
    grown = widen(PARAMS, LABELS, True, UNITS, "hidden", 1, key=KEY)
    state = tx.init(PARAMS)
    oxs.transfer_state(tx, state, PARAMS, tx, grown.params, growth=grown)
    sizes = moving.move._cache_size()
    oxs.transfer_state(tx, aged(state), PARAMS, tx, grown.params, growth=grown)
    assert moving.move._cache_size() == sizes
