"""What all presets share: how parts become one transformation, and which arguments they all take."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align, is_function, is_traced
from optax_structure.labels import LabelFn, Labels
from optax_structure.state.markers import RunClock
from optax_structure.structure import Units
from optax_structure.transforms._connection import CohortRule, ConnectionRule, ElementRule, optional_rule
from optax_structure.transforms._extra import Rule, check_number, takes_extra_args, transformation
from optax_structure.transforms._multiplier import Factors, LeafGroup, Multiplier, multiplier
from optax_structure.transforms.connection_rules import age_rule, extrema_rule
from optax_structure.transforms.connections import scale_by_connection
from optax_structure.transforms.depth import scale_by_depth, scale_by_depth_bands, scale_by_depth_profile
from optax_structure.transforms.events import scale_on_event
from optax_structure.transforms.observe import ObserveState, second_moments
from optax_structure.transforms.per_leaf import per_leaf
from optax_structure.transforms.product import scale_by_product
from optax_structure.transforms.scaling import scale_by_label

Schedule = Callable[[Any], Any]
Bounds = tuple[float, float] | None
Preset = Any
Made = TypeVar("Made")

ADAM = per_leaf(optax.scale_by_adam())
"""The optimizer of every preset, unless ``inner=`` says another: Adam with one step count a leaf."""

OTHERS = "every other label"
YOUNG = ("patch", "new", "neck", "adapter")
"""Labels of parts that were added to a network, and so may need a warm-up."""


class Parts(NamedTuple):
    """What a preset multiplies: transformations, and the rules of single connections, which share one of them."""

    multipliers: tuple[Multiplier | None, ...] = ()
    rules: tuple[ConnectionRule | None, ...] = ()

    def and_(self, *multipliers: Multiplier | None, rules: tuple[ConnectionRule | None, ...] = ()) -> Parts:
        """These parts and more."""
        return Parts(self.multipliers + multipliers, self.rules + rules)


def recipe(
    name: str,
    learning_rate: float | Schedule,
    parts: Parts,
    *,
    bounds: Bounds,
    inner: optax.GradientTransformation,
    join: Callable[..., optax.GradientTransformationExtraArgs] = optax.chain,
) -> optax.GradientTransformationExtraArgs:
    """``inner``, the clipped product of the parts, the learning rate: in this order.

    Args:
      name: of the preset.
      learning_rate: base rate, >= 0, or a schedule.
      parts: what is multiplied; None for a part that is switched off.
      bounds: lower and upper bound of the product; None for none.
      inner: the optimizer without a rate.
      join: how the optimizer and what follows are chained: ``watched`` where a rule reads the second moments.
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    if inner is not ADAM:
        check_direction(inner)
    low, high = bounds or (0.0, math.inf)
    rules = [rule for rule in parts.rules if rule is not None]
    members = [part for part in parts.multipliers if part is not None]
    members += [scale_by_connection(*rules)] if rules else []
    product = scale_by_product(*members, min_scale=low, max_scale=high)
    whole = join(inner, optax.chain(product, optax.scale_by_learning_rate(learning_rate)))

    # A function of its own, because the rule of the preset is set on it and `whole` may have one already.
    def update_fn(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any) -> Any:
        return whole.update(updates, state, params, **extra_args)

    return transformation(whole.init, update_fn, Rule(f"presets.{name}", inner=(whole,)))


def watched(
    inner: optax.GradientTransformation, rest: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain(inner, rest)`` in which ``rest`` is given ``inner``'s second moments: ``observe`` for less.

    ``observe`` traces all that stands in it twice to learn the moments, this traces ``inner`` alone twice.
    """
    first, second = (takes_extra_args(tx) for tx in (inner, rest))

    def init_fn(params: optax.Params) -> ObserveState:
        weight = jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params)
        return ObserveState(weight, (first.init(params), second.init(params)))

    def update_fn(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any) -> Any:
        before = ObserveState(state.weight, state.inner_state[0])
        moments, weight = second_moments(first, updates, before, params, extra_args)
        updates, one = first.update(updates, before.inner_state, params, **extra_args)
        given = {} if moments is None else {"second_moment": moments}
        updates, two = second.update(updates, state.inner_state[1], params, **extra_args | given)
        return updates, ObserveState(weight, (one, two))

    return transformation(init_fn, update_fn, Rule("second_moments", {}, "4 B a leaf", (first, second)))


def shows(*parts: Callable[..., Parts]) -> Callable[[Preset], Preset]:
    """Let ``help`` show the numbers that a preset hands on to ``parts``, with their defaults."""

    def decorate(preset: Preset) -> Preset:
        mine = inspect.signature(preset)
        shared = [p for p in mine.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = [
            p for fn in reversed(parts) for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY
        ]
        # A default that a later level changes stands for the earlier one's.
        preset.__signature__ = mine.replace(parameters=[*shared, *{p.name: p for p in taken}.values()])
        return preset

    return decorate


def check_direction(inner: optax.GradientTransformation) -> None:
    """Raise ``ValueError`` for an optimizer that already applies a rate: its update points against the gradient."""
    try:
        with jax.ensure_compile_time_eval():
            leaf = jnp.ones((2, 2))
            tx = takes_extra_args(inner)
            state, slope = tx.init(leaf), jnp.zeros(())
            for _ in range(4):  # the first updates of optax.MultiSteps are 0
                update, state = tx.update(leaf, state, leaf, value=jnp.ones(()))
                slope = jnp.minimum(slope, jnp.sum(jnp.asarray(update)))  # the gradient is 1 everywhere
    except Exception:  # made for a whole tree (a partition, a masked one): it cannot be tried on a leaf
        return
    if not is_traced(slope) and float(slope) < 0:
        raise ValueError(
            f"inner={_shown(inner)} already applies a learning rate (its update points against the gradient), and the "
            "preset applies its own. Pass the part before it: optax.scale_by_adam() for optax.adam(1e-3), "
            "optax.trace(0.9) for optax.sgd(1e-2, momentum=0.9)."
        )


def _shown(tx: optax.GradientTransformation) -> str:
    return getattr(tx.update, "__qualname__", type(tx).__qualname__).split(".")[0]


def by_label(
    rates: Mapping[str, float] | None, labels: Labels | LabelFn, *, warmup: float | None, steps_per_epoch: int
) -> Multiplier | None:
    """The rate of every label, labels that are not listed at 1; young parts reach theirs in ``warmup`` epochs."""
    if rates is None and warmup is None:
        return None
    scales: dict[str, float | Schedule] = dict(rates or {})
    for label, rate in scales.items():
        check_number(f"rates[{label!r}]", rate)
    if warmup is not None:
        steps = in_steps("warmup", warmup, steps_per_epoch)
        scales |= {label: rising((rates or {}).get(label, 1.0), steps) for label in YOUNG}
    return scale_by_label(*listed(scales, labels))


def listed(
    scales: Mapping[str, float | Schedule], labels: Labels | LabelFn
) -> tuple[dict[str, float | Schedule], Labels | LabelFn]:
    """Scales and labels in which every label that has no scale has the factor 1."""

    def known(labels: Labels) -> Labels:
        return jax.tree.map(lambda label: label if label in scales else OTHERS, labels)

    every: dict[str, float | Schedule] = {**scales, OTHERS: 1.0}
    return every, (lambda params: known(labels(params))) if is_function(labels) else known(labels)


def part(argument: str, value: Any, make: Callable[[Any], Made]) -> Made | None:
    """``make(value)``, None where the value is None; what goes wrong is said to be the fault of the argument."""
    if value is None:
        return None
    try:
        return make(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument}={value!r} does not do: {error}") from error


def rising(rate: float, steps: int) -> Schedule:
    """A warm-up whose first update is not lost: ``rate / steps`` at count 0, ``rate`` from ``steps - 1`` on."""
    return lambda count: rate * jnp.minimum((jnp.asarray(count, jnp.float32) + 1.0) / max(steps, 1), 1.0)


def in_steps(name: str, epochs: float, steps_per_epoch: int) -> int:
    """Epochs as whole steps."""
    check_number(name, epochs)
    return round(epochs * steps_per_epoch)


def check_epoch(steps_per_epoch: int) -> None:
    """Raise ``ValueError`` unless an epoch has a whole number of steps, one at least."""
    if not is_traced(steps_per_epoch) and (steps_per_epoch < 1 or steps_per_epoch != int(steps_per_epoch)):
        raise ValueError(f"steps_per_epoch={steps_per_epoch!r} must be an int >= 1: len(x_train) // batch_size.")


def backoff_part(backoff: tuple[float, float] | None, steps_per_epoch: int) -> Multiplier | None:
    """A factor an epoch, and the floor of their product."""

    def make(given: tuple[float, float]) -> Multiplier:
        decay, floor = given
        check_number("the factor", decay, high=1.0)
        check_number("the floor", floor, high=1.0)
        schedule = optax.exponential_decay(1.0, steps_per_epoch, decay, end_value=floor)
        return over_time("backoff", schedule, decay=decay, floor=floor, steps_per_epoch=steps_per_epoch)

    return part("backoff", backoff, make)


def profile_part(profile: tuple[float, float] | None, depths: PyTree | None) -> Multiplier | None:
    """From the first number at the input to the second at the output."""

    def make(given: tuple[float, float]) -> Multiplier:
        first, last = given
        return scale_by_depth_profile(lambda x: first + (last - first) * x, depths)

    return part("profile", None if depths is None else profile, make)


def bands_part(bands: tuple[float, float, float] | None, depths: PyTree | None) -> Multiplier | None:
    """A factor for each third of the depths."""
    return part(
        "bands", bands if depths is not None else None, lambda given: scale_by_depth_bands(*given, depths=depths)
    )


def decay_part(depth_decay: float | None, depths: PyTree | None) -> Multiplier | None:
    """The first layer at ``depth_decay`` of the last one's rate."""
    return part(
        "depth_decay", depth_decay if depths is not None else None, lambda decay: scale_by_depth(decay, depths=depths)
    )


def event_part(
    event: Mapping[str, float] | None, labels: Labels | LabelFn, *, recovery: float | None, steps_per_epoch: int
) -> Multiplier | None:
    """Factors by label at every event, at 0.1 in all and no less."""
    steps = part("recovery", recovery, lambda epochs: max(in_steps("recovery", epochs, steps_per_epoch), 1))
    damped = part("event", event, lambda event: scale_on_event(event, labels, min_scale=0.1, recovery=steps))
    if damped is None:
        return None
    factors_of = damped.factors

    def factors(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any) -> Any:
        # What an event did stays in force in the steps in which none is passed.
        happened = extra_args.pop("event", None)
        return factors_of(updates, state, params, event=False if happened is None else happened, **extra_args)

    return multiplier(damped.init, factors, damped.rule)


def connections_age_part(connection_age: tuple[float, float] | None, steps_per_epoch: int) -> CohortRule | None:
    """Rates that fall to 1/e with the age of a connection in so many epochs, down to a floor."""

    def make(given: tuple[float, float]) -> CohortRule:
        epochs, floor = given
        check_number("the floor", floor, high=1.0)
        steps = max(in_steps("the epochs", epochs, steps_per_epoch), 1)
        return age_rule(optax.exponential_decay(1.0, steps, 1 / math.e, end_value=floor))

    return part("connection_age", connection_age, make)


def extreme_units_part(argument: str, boost: float | None, units: Units | None) -> ElementRule | None:
    """The factor of connections at an extreme unit, where ``extrema=`` is passed."""
    given = None if units is None else boost
    return part(argument, given, lambda boost: optional_rule(extrema_rule(cast(Units, units), boost=boost)))


def over_time(name: str, schedule: Schedule, **numbers: Any) -> Multiplier:
    """One factor for all leaves, of the number of updates so far."""

    def init(params: optax.Params) -> RunClock:
        del params
        return RunClock(jnp.zeros((), jnp.int32))

    def factors(updates: optax.Updates, state: RunClock, params: optax.Params | None = None, **extra_args: Any) -> Any:
        del params, extra_args
        now, places = schedule(state.count), tuple(range(len(jax.tree.leaves(updates))))
        group = LeafGroup(places, ([0.0] * len(places),), lambda _: now)
        return Factors((group,)), RunClock(jnp.asarray(optax.safe_increment(state.count)))

    return multiplier(init, factors, Rule(name, numbers, "4 B"))


def if_given(argument: str, part: Multiplier) -> Multiplier:
    """``part``, which needs an extra argument, as one that says nothing when it is not passed."""

    def factors(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any) -> Any:
        if extra_args.get(argument) is None:
            return Factors(), state
        return part.factors(updates, state, params, **extra_args)

    rule = part.rule
    return multiplier(part.init, factors, rule._replace(name=f"{rule.name} where {argument}= is passed"))


def only(part: Multiplier, where: Callable[[PyTree], PyTree]) -> Multiplier:
    """``part`` for the leaves that ``where(updates)`` (a tree of bools) chooses; it says nothing of the others."""

    def factors(updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any) -> Any:
        said, state = part.factors(updates, state, params, **extra_args)
        chosen = jax.tree.leaves(where(updates))
        return Factors(
            tuple(_chosen(group, chosen) for group in said.groups),
            {place: factor for place, factor in said.elements.items() if chosen[place]},
        ), state

    return multiplier(part.init, factors, part.rule)


def _chosen(group: LeafGroup, chosen: list[bool]) -> LeafGroup:
    kept = [index for index, place in enumerate(group.leaves) if chosen[place]]
    columns = tuple([column[index] for index in kept] for column in group.columns)
    return LeafGroup(tuple(group.leaves[index] for index in kept), columns, group.of)


def kernels(updates: PyTree) -> PyTree:
    """The leaves with two axes or more."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, updates)


def labelled(label: str, labels: Labels | LabelFn) -> Callable[[PyTree], PyTree]:
    """The leaves of one label."""
    return lambda updates: jax.tree.map(lambda other: other == label, align(labels, updates, "labels"))
