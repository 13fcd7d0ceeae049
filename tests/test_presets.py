"""Presets: what each multiplies, worked by hand; that they differ; that parts switch off; what they refuse."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_close, make_grads, make_params, masks, train
from rows import KEPT, SHARED

import optax_structure as oxs
from optax_structure._tree import PyTree, leaves_by_path
from optax_structure.presets._recipe import ADAM

# loss_aware needs the loss and has no fixed rates: tests/test_loss_aware.py.
NAMES = [name for name in oxs.presets.__all__ if name != "loss_aware"]
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Three layers of one bias each: whatever is said of kernels alone is silent here.
PARAMS = {"first": jnp.ones(1), "second": jnp.ones(1), "head": jnp.ones(1)}
LABELS = {"first": "scaffold", "second": "scaffold", "head": "new"}
DEPTHS = {"first": 0, "second": 1, "head": 2}
MANY = oxs.Extrema(dead={"first": jnp.array([True, False])}, saturated={"first": jnp.array([False, False])})


def after(tx: Any, updates: int, **extra: Any) -> dict[str, float]:
    """The rates of the three layers at the update with that number, counted from 0."""

    whole = {name: value for name, value in extra.items() if not isinstance(value, jax.Array)}  # arrays: a step's each
    each = {name: value for name, value in extra.items() if name not in whole}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run() -> PyTree:
        def step(state: Any, now: dict[str, Any]) -> Any:
            return tx.update(PARAMS, state, PARAMS, **whole, **now)[1], None

        state, _ = jax.lax.scan(step, tx.init(PARAMS), {n: v[:updates] for n, v in each.items()}, length=updates)
        return oxs.rates(tx, state, PARAMS, **whole, **{name: value[updates] for name, value in each.items()})

    return {path: float(rate) for path, rate in run().items()}


def given(**numbers: Any) -> dict[str, Any]:
    return {"labels": LABELS, "depths": DEPTHS, "steps_per_epoch": 10} | numbers


# preset -> (updates, extra arguments of all steps, rates of first, second, head worked by hand)
BY_HAND: dict[str, list[tuple[int, dict[str, Any], list[float]]]] = {
    "basic": [
        # label .5 .5 1 x band .6 .8 1 x birth .5; an age of 0
        (0, {}, [0.5 * 0.6 * 0.5, 0.5 * 0.8 * 0.5, 0.5]),
        # ten epochs: backoff .95**10, clamp 1 - 100/1000
        (100, {}, [f * 0.95**10 * 0.9 for f in (0.15, 0.2, 0.5)]),
        # 25 epochs: the stage of epoch 20, clamp 0.75, backoff .95**25
        (250, {}, [f * 0.95**25 * 0.75 * 0.7 for f in (0.15, 0.2, 0.5)]),
    ],
    "advanced": [
        # basic x profile .5 .75 1
        (0, {}, [0.15 * 0.5, 0.2 * 0.75, 0.5]),
        # half of the units are extreme: explosive, factor 1
        (0, {"extrema": MANY}, [0.15 * 0.5, 0.2 * 0.75, 0.5]),
        # no unit is: refinement, factor .5
        (0, {"extrema": jax.tree.map(jnp.zeros_like, MANY)}, [0.15 * 0.25, 0.2 * 0.375, 0.25]),
    ],
    "comprehensive": [
        # advanced; the head is warmed up over 10 steps, by one tenth at its first
        (0, {}, [0.15 * 0.5, 0.2 * 0.75, 0.05]),
        (0, {"event": True}, [0.15 * 0.25, 0.2 * 0.375, 0.05]),
    ],
    "ultimate": [
        # as comprehensive: the trust ratio is of kernels, and the first observations of the loss are exploration
        (0, {"value": 1.0}, [0.15 * 0.5, 0.2 * 0.75, 0.05]),
    ],
    "conservative": [
        (0, {}, [0.3 * 0.5, 0.3 * 0.75, 0.1]),
        (50, {}, [0.15 * 0.98**5, 0.225 * 0.98**5, 0.98**5]),
        (0, {"event": True}, [0.075, 0.1125, 0.1]),
    ],
    "aggressive": [
        # label 1 1 2 x profile 1 1.25 1.5
        (0, {}, [1.0, 1.25, 3.0]),
        (20, {}, [0.81, 0.81 * 1.25, 0.81 * 3.0]),
        (400, {}, [0.05, 0.0625, 0.15]),  # the floor of the backoff
    ],
    "balanced": [
        (0, {}, [0.6 * 0.8, 0.6 * 0.9, 0.1]),
        (9, {}, [0.48 * 0.95**0.9, 0.54 * 0.95**0.9, 0.95**0.9]),  # the head's warm-up is over with its tenth update
        (0, {"event": True}, [0.48 * 0.7, 0.54 * 0.7, 0.1]),
        # an event at step 0, seen 20 steps later, the recovery's 2 epochs: .3 of the rate is lost, 1/e of that is left
        (20, {"event": jnp.arange(21) == 0}, [f * 0.95**2 * (1 - 0.3 * np.exp(-1)) for f in (0.48, 0.54)] + [0.95**2]),
    ],
    "extrema_focused": [
        (0, {}, [0.35, 0.7, 1.5]),
        (0, {"extrema": MANY}, [0.7, 1.4, 3.0]),
        (0, {"extrema": jax.tree.map(jnp.zeros_like, MANY)}, [0.175, 0.35, 0.75]),
        (600, {}, [0.35 * np.exp(-1), 0.7 * np.exp(-1), 1.5 * np.exp(-1)]),
    ],
    "fine_tuning": [
        (49, {}, [0.4, 0.4, 1.0]),
        (50, {}, [0.004, 0.004, 0.1]),  # from epoch 5: depths 0 and 1 at .01, others at .1
        (200, {}, [0.0, 0.0, 0.1]),  # from epoch 20: all but the last frozen
    ],
    "structure_net": [
        # label .35 .35 1, depth .5 .7071 1, connections at a fifth of their warm-up of 5 steps
        (0, {}, [0.35 * 0.5 / 5, 0.35 * 0.5**0.5 / 5, 0.2]),
        (4, {}, [0.175, 0.35 * 0.5**0.5, 1.0]),
        (4, {"event": jnp.arange(10) == 0}, [f * (1 - 0.3 * np.exp(-0.4)) for f in (0.175, 0.35 * 0.5**0.5)] + [1.0]),
    ],
    "transfer_learning": [
        (0, {}, [0.25 * 0.7, 0.25 * 0.7**0.5, 0.1]),
        (9, {}, [0.175, 0.25 * 0.7**0.5, 1.0]),
    ],
    "continual_learning": [
        (0, {}, [0.2 * 0.7, 0.2 * 0.7**0.5, 1.0]),
        (0, {"event": True}, [0.07, 0.1 * 0.7**0.5, 1.0]),
        (201, {}, [0.3 * 0.14, 0.3 * 0.2 * 0.7**0.5, 0.3]),  # sediment after 20 epochs
        (1001, {}, [0.1 * 0.14, 0.1 * 0.2 * 0.7**0.5, 0.1]),  # geological after 100
    ],
    "combined": [
        # depth within the scaffold: .3 and 1; a step every 20 epochs
        (0, {}, [0.3, 1.0, 0.1]),
        (199, {}, [0.3, 1.0, 1.0]),
        (200, {}, [0.03, 0.1, 1.0]),
    ],
}


FEW = ("basic", "balanced", "structure_net", "continual_learning")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_rates_by_hand(name: str) -> None:
    tx = getattr(oxs.presets, name)(1e-3, **given())
    for updates, extra, expected in BY_HAND[name]:
        found = after(tx, updates, **extra)
        np.testing.assert_allclose(
            [found[layer] for layer in PARAMS], expected, rtol=2e-6, err_msg=f"{updates} {extra}"
        )


KERNELS = {"first": {"kernel": jnp.array([[4.0, 0.5, 0.01]])}, "head": {"kernel": jnp.array([[0.5], [0.5], [0.5]])}}


def of_first(tx: Any, **extra: Any) -> list[float]:
    """The rates of the first kernel's three connections at the first update, every gradient being 1."""
    ones = jax.tree.map(jnp.ones_like, KERNELS)
    rates = oxs.rates(tx, tx.init(KERNELS), KERNELS, grads=ones, **extra)
    return np.broadcast_to(rates["first"]["kernel"], (1, 3))[0].tolist()


def off_but(preset: Any, **on: Any) -> Any:
    """A preset with every part off but these."""
    off = {n: KEPT.get(n) for n in inspect.signature(preset).parameters if n not in SHARED}
    return preset(1e-3, "scaffold", bounds=None, **(off | on))


def test_rules_of_connections_in_the_presets_by_hand() -> None:
    units = oxs.dense_chain(KERNELS, ["first", "head"])
    none = jnp.zeros(3, bool)
    extrema = oxs.Extrema(dead={"first": none.at[2].set(True)}, saturated={"first": none})
    # Fan-in 1: strength 4 is above 3, .5 between, .01 below .1.
    assert of_first(off_but(oxs.presets.comprehensive, strength=(0.7, 1.3))) == pytest.approx([0.7, 1.0, 1.3])
    # The root of the second moment is 1, above .01.
    assert of_first(off_but(oxs.presets.ultimate, gradient=(0.5, 1.3))) == pytest.approx([0.5] * 3)
    # Connections of the third unit, which is dead.
    boosted = off_but(oxs.presets.ultimate, extrema_boost=1.5, units=units)
    assert of_first(boosted, extrema=extrema) == pytest.approx([1.0, 1.0, 1.5])
    assert of_first(boosted) == [1.0] * 3
    focused = off_but(oxs.presets.extrema_focused, boost=3.0, units=units)
    assert of_first(focused, extrema=extrema) == pytest.approx([1.0, 1.0, 3.0])
    # Adam's first update has entries of 1: 10 * |w| / |u| = 10 * sqrt(16.2501 / 3), capped at 2; without the cap that.
    assert of_first(off_but(oxs.presets.ultimate, trust=(10.0, 2.0))) == pytest.approx([2.0] * 3)
    expected = 0.1 * np.sqrt(16.2501 / 3)
    assert of_first(off_but(oxs.presets.ultimate, trust=(0.1, 2.0))) == pytest.approx([expected] * 3, rel=1e-4)
    # Density 1/3 is above 10 %, 1 % below 2 %.
    masks = {"first": {"kernel": jnp.array([[True, False, False]])}, "head": {"kernel": jnp.asarray(True)}}
    dense = off_but(oxs.presets.comprehensive, by_density=(1.5, 0.75))
    assert of_first(dense, masks=masks) == pytest.approx([0.75] * 3)
    assert of_first(dense) == [1.0] * 3
    # Births: everything is of step 0, before epoch 20.
    assert of_first(off_but(oxs.presets.basic, births=((20.0, 0.5),))) == [0.5] * 3


def test_loss_phases_in_ultimate() -> None:
    """A loss that stands still is a plateau once the window of five is full."""
    tx = off_but(oxs.presets.ultimate, loss_phase=(1.0, 0.8, 0.6, 0.5))
    assert [after(tx, updates, value=1.0)["first"] for updates in (3, 6)] == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("basic", {"clamp": (-1.0, 0.5)}, r"clamp=\(-1\.0, 0\.5\) does not do: the epochs=-1\.0"),
        ("basic", {"bands": (1.0, 2.0), "depths": DEPTHS}, r"bands=\(1\.0, 2\.0\) does not do"),
        ("basic", {"births": ((20.0, -1.0),)}, r"births=.*does not do: bands\[0\] factor=-1\.0"),
        ("comprehensive", {"by_density": (-1.0, 1.0)}, r"by_density=.*the factor of sparse leaves=-1\.0"),
        ("balanced", {"backoff": (1.5, 0.1)}, r"backoff=.*the factor=1\.5"),
        ("balanced", {"rates": {"scaffold": -1.0}}, r"rates\['scaffold'\]=-1\.0"),
        (
            "fine_tuning",
            {"freezing": (20.0, 5.0), "depths": DEPTHS},
            r"freezing=\(20\.0, 5\.0\) does not do: phases start",
        ),
        ("continual_learning", {"strata_rates": (1.0,)}, r"strata_rates=\(1\.0,\) does not do"),
        ("combined", {"patches": -0.5}, r"patches=-0\.5"),
        ("ultimate", {"trust": (-1.0, 2.0)}, r"trust=.*trust_coefficient=-1\.0"),
        ("extrema_focused", {"connection_age": (10.0, 2.0)}, r"connection_age=.*the floor=2\.0"),
    ],
)
def test_bad_numbers_are_named(name: str, numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(oxs.presets, name)(1e-3, LABELS, **numbers)


def test_leaves_and_growth_between_the_groups_of_a_partition() -> None:
    """A new leaf enters a group of presets whose clock is the run's, and a leaf changes groups."""
    old, new = {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}

    def make(labels: dict[str, str]) -> Any:
        tx = oxs.presets.balanced(1e-3, labels, steps_per_epoch=10)
        return optax.multi_transform({"scaffold": tx, "new": tx}, labels)

    tx = make({"a": "scaffold", "b": "new"})
    _, state = tx.update(old, tx.init(old), old)
    after = make({"a": "scaffold", "b": "scaffold", "c": "new"})
    state = oxs.transfer_state(tx, state, old, after, new)
    rates = {path: float(rate) for path, rate in oxs.rates(after, state, new).items()}
    backoff = 0.95**0.1
    assert rates == pytest.approx({"a": 0.6 * backoff, "b": 0.6 * backoff, "c": 0.1 * backoff})


def plain(params: PyTree, name: str) -> dict[str, Any]:
    """A tree labelled only scaffold and new, no depths, no extra arguments."""
    return {"labels": jax.tree.map(lambda leaf: "new" if leaf.ndim == 1 else "scaffold", params), "steps_per_epoch": 5}


@pytest.mark.slow
def test_presets_differ_where_nothing_is_passed() -> None:
    params, grads = make_params(), make_grads(make_params(), steps=12)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: PyTree) -> dict[str, PyTree]:
        made = {name: getattr(oxs.presets, name)(1.0, **plain(params, name)) for name in NAMES}
        return {name: train(tx, params, grads).updates for name, tx in made.items()}

    total = {
        name: np.concatenate([np.abs(leaf).sum(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(updates)])
        for name, updates in run(params).items()
    }
    for one, two in itertools.combinations(NAMES, 2):
        apart = np.max(np.abs(total[one] - total[two]) / np.maximum(total[one], total[two]))
        assert apart > 0.01, f"{one} and {two} make the same updates to one percent"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_part_switches_off(name: str) -> None:
    """With all parts off a preset is its optimizer and the rate."""
    params, grads = make_params(), make_grads(make_params())
    preset = getattr(oxs.presets, name)
    off = {number: KEPT.get(number) for number in inspect.signature(preset).parameters if number not in SHARED}
    tx = preset(0.1, **plain(params, name), bounds=None, **off)
    both = jax.jit(
        lambda p: (train(tx, p, grads).updates, train(optax.chain(ADAM, optax.scale(-0.1)), p, grads).updates)
    )
    assert_close(*both(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_presets_work_inside_a_partition(name: str) -> None:
    """One preset in both groups gives what it gives alone."""
    params, grads = make_params(), make_grads(make_params())
    extra = {"value": jnp.ones(()), "event": jnp.asarray(True), "masks": masks(params)}
    labels = plain(params, name)["labels"]
    tx = getattr(oxs.presets, name)(0.1, **plain(params, name))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(p: PyTree) -> Any:
        both = optax.multi_transform({"scaffold": tx, "new": tx}, labels)
        return train(tx, p, grads, **extra).updates, train(both, p, grads, **extra).updates

    assert_close(*run(params))


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(1e-3),
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(optax.constant_schedule(1e-3)),
        optax.lion(1e-4),
        oxs.per_leaf(optax.adam(1e-3)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(1e-3)),
        optax.MultiSteps(optax.adam(1e-3), 2),
    ],
    ids=["adam", "sgd", "adamw", "lion", "per_leaf", "chain", "multi_steps"],
)
def test_an_inner_that_applies_a_rate_is_refused(inner: Any) -> None:
    with pytest.raises(ValueError, match=r"inner=\w+ already applies a learning rate.*optax\.scale_by_adam\(\)"):
        oxs.presets.balanced(1e-3, LABELS, inner=inner)


def test_an_inner_without_a_rate_is_taken() -> None:
    for inner in (optax.trace(0.9), optax.chain(ADAM, optax.add_decayed_weights(0.1)), optax.identity()):
        oxs.presets.balanced(1e-3, LABELS, inner=inner)


def test_labels_that_are_not_listed_have_the_factor_one() -> None:
    labels = {"first": "scaffold", "second": "somebody's", "head": "own"}
    tx = oxs.presets.balanced(1e-3, labels, steps_per_epoch=1, event=None, backoff=None)
    assert [after(tx, 0)[layer] for layer in PARAMS] == pytest.approx([0.6, 1.0, 1.0])
    by_path = oxs.label_by_path([("first", "scaffold")], default="somebody's")
    tx = oxs.presets.combined(1e-3, by_path)
    assert after(tx, 0)["second"] == 1.0


def test_bounds_clip_the_product_and_spare_what_is_frozen() -> None:
    rates = {"scaffold": 0.0, "new": 100.0}
    tx = oxs.presets.aggressive(1e-3, LABELS, rates=rates, bounds=(0.5, 2.0))
    assert after(tx, 0) == {"first": 0.0, "head": 2.0, "second": 0.0}


def test_event_stays_in_force_when_it_is_no_longer_passed() -> None:
    tx = oxs.presets.conservative(1e-3, LABELS, steps_per_epoch=100, warmup=None, backoff=None)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS, event=jnp.asarray(True))
    assert float(oxs.rates(tx, state, PARAMS)["first"]) == pytest.approx(0.15)


def test_a_learning_rate_may_be_a_schedule() -> None:
    schedule = optax.linear_schedule(1.0, 0.5, 1)
    tx = oxs.presets.aggressive(schedule, LABELS, rates=None, backoff=None, inner=optax.identity())
    state = tx.init(PARAMS)
    for expected in (-1.0, -0.5):
        updates, state = tx.update(PARAMS, state, PARAMS)
        assert {float(leaf[0]) for leaf in jax.tree.leaves(updates)} == {expected}


@pytest.mark.parametrize("name", NAMES)
def test_signatures_show_the_numbers(name: str) -> None:
    """``help`` shows every number with its default, those that a level takes from the one before included."""
    parameters = inspect.signature(getattr(oxs.presets, name)).parameters
    assert list(parameters)[:2] == ["learning_rate", "labels"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(parameters.values())[2:])
    assert set(SHARED) < set(parameters)
    with pytest.raises(TypeError, match="no_such_number"):
        getattr(oxs.presets, name)(1e-3, LABELS, no_such_number=1.0)


def test_each_level_has_the_numbers_of_the_one_before() -> None:
    levels = [
        set(inspect.signature(getattr(oxs.presets, n)).parameters)
        for n in ("basic", "advanced", "comprehensive", "ultimate")
    ]
    assert all(one < two for one, two in itertools.pairwise(levels))


def test_describe_prints_the_parts_of_a_preset() -> None:
    text = oxs.describe(oxs.presets.ultimate(1e-3, LABELS, depths=DEPTHS, units=None))
    parts = ["presets.ultimate", "optax.scale_by_adam", "scale_by_product(min_scale=0.003", "scale_by_label", "backoff"]
    parts += ["stages", "scale_by_depth_bands", "scale_by_age", "scale_by_extrema_phase", "scale_by_depth_profile"]
    parts += ["scale_on_event", "scale_by_density", "scale_by_loss_phase", "scale_by_masked_trust_ratio"]
    parts += ["scale_by_connection", "optax.scale(step_size=-0.001)"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "extrema= is passed" in text


@pytest.mark.slow
def test_presets_survive_growth() -> None:
    """Ages and event factors of old leaves carry over, a new leaf starts fresh, and its warm-up begins."""
    old, new = {"a": jnp.ones(2), "z": jnp.ones(2)}, {"a": jnp.ones(2), "m": jnp.ones(2), "z": jnp.ones(2)}

    def make(params: PyTree) -> Any:
        labels = {name: "new" if name == "m" else "scaffold" for name in params}
        return oxs.presets.comprehensive(1e-3, labels, steps_per_epoch=4, recovery=None)

    tx, state = make(old), make(old).init(old)
    for event in (True, False, False, False):
        _, state = tx.update(old, state, old, event=jnp.asarray(event))
    before = oxs.rates(tx, state, old)
    state = oxs.transfer_state(tx, state, old, make(new), new)
    rates = {path: float(rate) for path, rate in leaves_by_path(oxs.rates(make(new), state, new)).items()}
    assert rates["a"] == pytest.approx(float(before["a"])) and rates["z"] == pytest.approx(float(before["z"]))
    # One epoch: backoff .95 for all. Old: label .5, event .5, birth .5, clamp .99, age exp(-1/200). New: warm-up 1/4,
    # born at step 4 of 80, so birth .5 as well.
    assert rates["a"] == pytest.approx(0.95 * 0.5 * 0.5 * 0.5 * 0.99 * np.exp(-1 / 200), rel=1e-5)
    assert rates["m"] == pytest.approx(0.95 * 0.25 * 0.5, rel=1e-5)
