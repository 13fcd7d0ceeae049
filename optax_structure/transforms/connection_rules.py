"""The rules of single connections that ``scale_by_connection`` hosts: by cohort, and by what a connection is now.

``component_rule``, ``age_rule`` and ``birth_rule`` speak of cohorts and are folded into one table. ``strength_rule``,
``scale_rule``, ``gradient_rule`` and ``extrema_rule`` speak of every connection of a kernel, in arithmetic that fuses
with the update. All are factors on one base rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from optax_structure._tree import PyTree, is_function, is_traced
from optax_structure.structure import COMPONENTS, UnitAxis, Units
from optax_structure.transforms._connection import CohortRule, CohortTable, ElementRule, Kernel
from optax_structure.transforms._extra import check_number, check_schedule
from optax_structure.transforms._multiplier import select
from optax_structure.transforms.depth import checked_depths, third

RelativeTo = Literal["one", "fan_in"]


def age_rule(schedule: Callable[[Any], Any]) -> CohortRule:
    """A connection's factor is ``schedule(age)``, its age being 0 at its first update.

    Args:
      schedule: age (int32 scalar) -> factor: ``optax.linear_schedule(0.1, 1.0, 100)`` warms new connections up,
        a decaying one settles old ones.

    Returns:
      A rule for ``scale_by_connection``.

    Raises:
      ValueError: when ``schedule`` is not callable.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.scale_by_connection(oxs.age_rule(lambda age: 0.5 ** age))
      >>> state, seen = tx.init(jnp.ones((2, 2))), []
      >>> for _ in range(3):
      ...     update, state = tx.update(jnp.ones((2, 2)), state)
      ...     seen.append(float(update[0, 0]))
      >>> seen
      [1.0, 0.5, 0.25]
    """
    check_schedule("schedule", schedule, of="age")
    return CohortRule("age", lambda table: jax.vmap(schedule)(table.age))


def birth_rule(
    bands: Sequence[tuple[int, float]] = ((20, 0.1), (50, 0.5)), late: float = 1.0, temporal_decay: float = 0.01
) -> CohortRule:
    """What was there early learns slowly: a factor by the step of birth, which then decays with age.

    ``factor = m(birth) * exp(-temporal_decay * age)``: ``m`` is the factor of the first band whose end lies after the
    birth, ``late`` behind the last. With the defaults: 0.1 for births before step 20, 0.5 before 50, 1 from then on.

    The original counts epochs: multiply the ends by the steps of an epoch and divide ``temporal_decay`` by them. Its
    third threshold was never read and is left out.

    Args:
      bands: (end in updates, factor >= 0), the ends > 0 and increasing.
      late: factor >= 0 of what was born later than all bands.
      temporal_decay: decay per update of age, >= 0; 0 for none.

    Returns:
      A rule for ``scale_by_connection``.

    Raises:
      ValueError: for ends that do not increase, and for numbers below 0.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> birth = jnp.array([0, 19, 20, 50])
      >>> table = oxs.CohortTable(age=jnp.array([0, 0, 0, 100]), birth=birth, component=jnp.zeros(4, jnp.uint8))
      >>> oxs.birth_rule().factors(table).round(3).tolist()    # the last is exp(-1)
      [0.10000000149011612, 0.10000000149011612, 0.5, 0.3680000305175781]
    """
    ends, factors = [end for end, _ in bands], [factor for _, factor in bands]
    for number, (end, factor) in enumerate(bands):
        check_number(f"bands[{number}] factor", factor)
        check_number(
            f"bands[{number}] end", end, low=1 if not number or is_traced(ends[number - 1]) else ends[number - 1]
        )
    check_number("late", late)
    check_number("temporal_decay", temporal_decay)

    def table_of(table: CohortTable) -> jax.Array:
        by_band = jnp.stack([jnp.asarray(factor, jnp.float32) for factor in (*factors, late)])
        band = sum((table.birth >= end).astype(jnp.int32) for end in ends) if ends else jnp.zeros_like(table.birth)
        return by_band[band] * jnp.exp(-temporal_decay * table.age.astype(jnp.float32))

    return CohortRule("birth", table_of)


def component_rule(**factors: float) -> CohortRule:
    """A connection's factor is that of its component; components that are not named keep 1.

    An embedded patch is elements of a scaffold leaf, so no label of the leaf can tell them apart: their cohort does.

    Args:
      **factors: component -> factor >= 0, of ``scaffold``, ``patch``, ``new``, ``neck``, ``adapter``, ``pretrained``.

    Returns:
      A rule for ``scale_by_connection``.

    Raises:
      ValueError: for an unknown component or a negative factor.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> age = birth = jnp.zeros(3, jnp.int32)
      >>> table = oxs.CohortTable(age, birth, component=jnp.arange(3, dtype=jnp.uint8))
      >>> oxs.component_rule(scaffold=0.25, patch=0.5).factors(table).tolist()
      [0.25, 0.5, 1.0]
    """
    for component, factor in factors.items():
        if component not in COMPONENTS:
            raise ValueError(f"component_rule({component}=...): components are {', '.join(COMPONENTS)}.")
        check_number(component, factor)

    def table_of(table: CohortTable) -> jax.Array:
        by_code = jnp.ones(256, jnp.float32)
        for name, factor in factors.items():
            by_code = by_code.at[COMPONENTS.index(name)].set(factor)
        return by_code[table.component]

    return CohortRule("component", table_of)


def _check_bounds(low_name: str, low: float, high_name: str, high: float) -> None:
    check_number(low_name, low)
    check_number(high_name, high, low=0.0 if is_traced(low) else low)


def _check_relative_to(relative_to: str) -> None:
    if relative_to not in ("one", "fan_in"):
        raise ValueError(f"relative_to={relative_to!r} must be 'one' or 'fan_in'.")


def _strength(kernel: Kernel, relative_to: RelativeTo) -> tuple[jax.Array, float]:
    """``|w|``, and the unit in which the thresholds are: to scale two numbers costs less than every weight."""
    assert kernel.weights is not None  # the rules that come here read params
    unit = math.prod(kernel.shape[:-1]) ** -0.5 if relative_to == "fan_in" else 1.0
    return jnp.abs(kernel.weights.astype(jnp.float32)), unit


def strength_rule(
    strong: float = 0.5,
    weak: float = 0.1,
    strong_factor: float = 0.5,
    weak_factor: float = 2.0,
    *,
    relative_to: RelativeTo = "one",
) -> ElementRule:
    """Strong connections learn slowly, weak ones fast.

    ``strong_factor`` where ``|w| > strong``, ``weak_factor`` where ``|w| < weak``, else 1 (on a threshold: 1).

    The absolute thresholds are the original's. The weights of usual networks are of the size ``1 / sqrt(fan_in)``, so
    that nearly all of them are "weak" and the rule is one factor for all: ``relative_to="fan_in"`` compares
    ``|w| * sqrt(fan_in)``, which is about 1 in every layer.

    Args:
      strong, weak: thresholds on the strength, ``0 <= weak <= strong``.
      strong_factor, weak_factor: factors >= 0.
      relative_to: ``"one"`` compares ``|w|``; ``"fan_in"`` compares ``|w| * sqrt(fan_in)``, with the product of all
        axes but the last as fan-in.

    Returns:
      A rule for ``scale_by_connection``; ``update`` needs ``params``.

    Raises:
      ValueError: for numbers out of range or order, and an unknown ``relative_to``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = jnp.array([[0.75, -0.25, 0.05]])
      >>> tx = oxs.scale_by_connection(oxs.strength_rule())
      >>> tx.update(jnp.ones((1, 3)), tx.init(params), params)[0].tolist()
      [[0.5, 1.0, 2.0]]
    """
    _check_bounds("weak", weak, "strong", strong)
    check_number("strong_factor", strong_factor)
    check_number("weak_factor", weak_factor)
    _check_relative_to(relative_to)

    def factors(kernel: Kernel) -> jax.Array:
        size, unit = _strength(kernel, relative_to)
        return select(size > strong * unit, strong_factor, select(size < weak * unit, weak_factor, 1.0))

    return ElementRule("strength", factors, ("params",))


def scale_rule(
    depths: PyTree,
    coarse: float = 0.1,
    medium: float = 1.0,
    fine: float = 10.0,
    *,
    strong: float = 0.5,
    weak: float = 0.1,
    relative_to: RelativeTo = "one",
) -> ElementRule:
    """Coarse, medium and fine connections, by where they are and how strong they are.

    *Coarse*: in the first third of the depth and ``|w| > strong``. *Fine*: in the last third, or ``|w| < weak``. All
    others are *medium*. A layer at depth ``d = 0 .. D-1`` is in the first third where ``d / (D-1) < 1/3``, in the last
    where it is above ``2/3``, and in the middle when ``D = 1``.

    The original's absolute rates 0.001, 0.01 and 0.1 are the defaults here, as ratios to that of medium.

    Args:
      depths: tree of ints with the structure of params (see ``layer_depths``), a prefix, or a function of params. ``D``
        is one more than the greatest depth of the whole tree: inside ``optax.partition`` pass a tree.
      coarse, medium, fine: factors >= 0.
      strong, weak: thresholds on the strength, ``0 <= weak <= strong``.
      relative_to: as in ``strength_rule``.

    Returns:
      A rule for ``scale_by_connection``; ``update`` needs ``params``.

    Raises:
      ValueError: for numbers out of range or order, a negative depth, an unknown ``relative_to``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"early": jnp.array([[0.75, 0.25, 0.05]]), "late": jnp.array([[0.75, 0.25, 0.05]])}
      >>> tx = oxs.scale_by_connection(oxs.scale_rule({"early": 0, "late": 1}, coarse=0.125))
      >>> updates, _ = tx.update({name: jnp.ones((1, 3)) for name in params}, tx.init(params), params)
      >>> updates["early"].tolist(), updates["late"].tolist()
      ([[0.125, 1.0, 10.0]], [[10.0, 10.0, 10.0]])
    """
    for name, factor in (("coarse", coarse), ("medium", medium), ("fine", fine)):
        check_number(name, factor)
    _check_bounds("weak", weak, "strong", strong)
    _check_relative_to(relative_to)

    def thirds(depths: PyTree) -> PyTree:
        depths = checked_depths(depths)
        last = max(jax.tree.leaves(depths), default=0)
        return jax.tree.map(lambda depth: third(depth, last), depths)

    def factors(kernel: Kernel) -> jax.Array:
        (size, unit), where = _strength(kernel, relative_to), kernel.said
        faint = select((size < weak * unit) | (where == 2), fine, medium)
        return select((size > strong * unit) & (where == 0), coarse, faint)

    tree = (lambda params: thirds(depths(params))) if is_function(depths) else thirds(depths)
    return ElementRule("scale", factors, ("params",), tree)


def gradient_rule(
    high: float = 1.0, low: float = 0.01, high_factor: float = 0.5, low_factor: float = 2.0
) -> ElementRule:
    """Connections with large gradients learn slowly, those with small ones fast.

    With ``g`` the root of the running mean of the squared gradient: ``high_factor`` where ``g > high``, ``low_factor``
    where ``g < low``, else 1; 1 where ``g`` is exactly 0, which was never observed.

    The original kept a running mean of ``|g|`` of its own. Here the optimizer's second moment is read, which is there
    already: an average of that size kept beside it would cost a third of the optimizer again.

    Args:
      high, low: thresholds on ``g``, ``0 <= low <= high``, in the unit of the gradients that reach the optimizer.
      high_factor, low_factor: factors >= 0.

    Returns:
      A rule for ``scale_by_connection``; ``update`` needs ``second_moment=``, which ``observe`` hands on.

    Raises:
      ValueError: for numbers out of range or order.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.scale_by_connection(oxs.gradient_rule())
      >>> squares, ones = jnp.array([[4.0, 0.25, 1e-6, 0.0]]), jnp.ones((1, 4))
      >>> tx.update(ones, tx.init(ones), second_moment=squares)[0].tolist()
      [[0.5, 1.0, 2.0, 1.0]]
    """
    _check_bounds("low", low, "high", high)
    check_number("high_factor", high_factor)
    check_number("low_factor", low_factor)

    def factors(kernel: Kernel) -> jax.Array:
        square = jnp.asarray(kernel.second_moment, jnp.float32)  # no root of every entry: two numbers are squared
        return select(square > high**2, high_factor, select((square < low**2) & (square > 0), low_factor, 1.0))

    return ElementRule("gradient", factors, ("second_moment",))


def extrema_rule(units: Units, boost: float = 2.0) -> ElementRule:
    """Connections at dead or saturated units learn at another rate.

    ``factor = 1 + (boost - 1) * n``, where the nearness ``n`` of a connection is the largest value that ``extrema=``
    has for the unit that it reads and for the one that it makes, dead or saturated. Bools are 1 and 0; floats in
    [0, 1] are a nearness of the user's own: the original's boost by proximity ``p`` is ``n = max(1 - p / 0.1, 0)``,
    which nothing there ever computed. Kernels and layers that ``units`` or ``extrema=`` leave out keep factor 1.

    Args:
      units: unit groups (see ``dense_chain``). Behind a flatten, every position of an extreme channel counts.
      boost: factor at an extreme unit, >= 0.

    Returns:
      A rule for ``scale_by_connection``; ``update`` needs ``extrema=``.

    Raises:
      ValueError: for a negative ``boost`` or units that are none; in ``update``, for extrema of another size than the
        axis of the kernel.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.ones((1, 2))}, "head": {"kernel": jnp.ones((2, 1))}}
      >>> tx = oxs.scale_by_connection(oxs.extrema_rule(oxs.dense_chain(params, ["hidden", "head"])))
      >>> extrema = oxs.Extrema(dead={"hidden": jnp.array([True, False])}, saturated={})
      >>> updates, _ = tx.update(params, tx.init(params), extrema=extrema)
      >>> updates["hidden"]["kernel"].tolist(), updates["head"]["kernel"].tolist()
      ([[2.0, 1.0]], [[2.0], [1.0]])
    """
    if not isinstance(units, Units):
        raise ValueError(f"units={units!r} must be Units, such as dense_chain(params, layers).")
    check_number("boost", boost)
    ends: dict[str, list[tuple[str, UnitAxis]]] = {}
    for group in units.groups:
        for axis in group.axes:
            if axis.role in ("incoming", "outgoing"):
                ends.setdefault(axis.path, []).append((group.layer, axis))

    def factors(kernel: Kernel) -> jax.Array | None:
        assert kernel.extrema is not None  # it is in `reads`
        by_axis: dict[int, jax.Array] = {}
        for layer, axis in ends.get(kernel.path, ()):
            for sites in (kernel.extrema.dead, kernel.extrema.saturated):
                if layer not in sites:
                    continue
                along = jnp.asarray(sites[layer], jnp.float32)
                along = jnp.tile(along, axis.repeats) if axis.repeats > 1 else along
                if along.shape != (kernel.shape[axis.axis],):
                    raise ValueError(
                        f"extrema has {jnp.shape(sites[layer])} units for {layer!r}, but axis {axis.axis} of "
                        f"{kernel.path!r} has {kernel.shape[axis.axis]} entries for {axis.repeats} times these units."
                    )
                along = along.reshape([-1 if other == axis.axis else 1 for other in range(len(kernel.shape))])
                by_axis[axis.axis] = jnp.maximum(by_axis[axis.axis], along) if axis.axis in by_axis else along
        if not by_axis:
            return None
        return 1.0 + (boost - 1.0) * functools.reduce(jnp.maximum, by_axis.values())

    return ElementRule("extrema", factors, ("extrema",))
