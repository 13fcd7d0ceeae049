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


# The rules, by hand.


def test_component_factors() -> None:
    rule = oxs.component_rule(scaffold=0.25, new=0.0)
    by_code = rule.factors(jnp.zeros(256, jnp.int32), jnp.arange(256, dtype=jnp.uint8) % len(COMPONENTS))
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
    for index in range(1, count):
        now = index + 1
        # A growth action brings its connections in before the rewiring that drops others is followed.
        account.enter(np.flatnonzero(born[index] == PATCH).tolist(), now, PATCH)
        account.leave(masks[index])
        rewired = masks[index] & ~np.isin(np.arange(masks.shape[1]), list(account.cohort_of))
        account.enter(np.flatnonzero(rewired).tolist(), now, SCAFFOLD)
        np.testing.assert_array_equal(seen[index], account.table(masks.shape[1]), err_msg=f"event {index}")
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
