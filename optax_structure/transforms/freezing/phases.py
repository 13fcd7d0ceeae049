"""Freezing layer by layer as training goes on: as factors of one program, or one static program a phase."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree, align, is_function, is_traced
from optax_structure.labels import Labels
from optax_structure.transforms._extra import Described, Rule, check_number, transformation
from optax_structure.transforms._multiplier import Factors, Multiplier, every_leaf, multiplier
from optax_structure.transforms.depth import checked_depths
from optax_structure.transforms.freezing.labels import freeze_labels

DepthScales = float | Sequence[float] | Callable[[int, int], float]
"""Factor of a layer: one for all; by depth, the last one for all deeper ones; or ``(depth, last depth) -> factor``."""


class FreezePhase(NamedTuple):
    """From when on which layers learn how fast. A plain tuple ``(start, scales)`` does as well.

    Attributes:
      start: the update with which the phase begins, counted from 0.
      scales: factors >= 0: a number for all layers; a sequence by depth, whose last number holds for all deeper
        layers; or a function ``(depth, last depth) -> factor``, such as ``frozen_below`` returns. 0 freezes.
    """

    start: int
    scales: DepthScales


def frozen_below(depth: int, scale: float = 1.0) -> Callable[[int, int], float]:
    """Freeze the layers below a depth: scales for a ``FreezePhase``.

    Args:
      depth: the first layer that learns; counted from the end where negative: -1 is the last layer alone. Beyond the
        last depth nothing learns, which ``progressive_freezing`` refuses where it knows the whole tree.
      scale: factor >= 0 of the layers that learn.

    Returns:
      ``(depth, last depth) -> factor``.

    Raises:
      ValueError: for a negative scale.

    Example:
      >>> import optax_structure as oxs
      >>> [oxs.frozen_below(-2, 0.1)(depth, 3) for depth in range(4)]
      [0.0, 0.0, 0.1, 0.1]
    """
    check_number("scale", scale)
    return lambda of, last: scale if of >= (depth if depth >= 0 else last + 1 + depth) else 0.0


def _checked_phases(phases: Sequence[FreezePhase | tuple[int, DepthScales]]) -> tuple[FreezePhase, ...]:
    if any(isinstance(phase, str) or len(phase) != 2 for phase in phases):
        raise ValueError(f"phases={phases!r} must be pairs (start, scales).")
    checked = tuple(FreezePhase(*phase) for phase in phases)
    starts = [phase.start for phase in checked]
    for index, start in enumerate(starts):
        if not isinstance(start, int | np.integer):
            raise ValueError(f"phases[{index}].start={start!r} must be an int, counted in updates.")
    if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise ValueError(f"phases start at {starts}; the first must start at 0 and each later than the one before.")
    for index, (_, scales) in enumerate(checked):
        if isinstance(scales, Sequence) and not scales:
            raise ValueError(f"phases[{index}].scales={scales!r} must not be empty.")
        given = () if callable(scales) else scales if isinstance(scales, Sequence) else (scales,)
        if isinstance(scales, str) or not all(map(_is_number, given)):
            raise ValueError(
                f"phases[{index}].scales={scales!r} must be a number, a tuple of numbers by depth, or a function "
                "(depth, last depth) -> number."
            )
        for number in given:
            check_number(f"phases[{index}].scales", number)
    return checked


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, jax.Array | np.ndarray | np.generic) and value.ndim == 0)


def _last_depth(depths: PyTree) -> int:
    return max(jax.tree.leaves(depths), default=0)


def _row(scales: DepthScales, last: int) -> list[float]:
    """The factors of depths 0 .. ``last``."""
    if callable(scales):
        row = [scales(depth, last) for depth in range(last + 1)]
        for depth, scale in enumerate(row):
            check_number(f"scales({depth}, {last})", scale)
        return row
    if isinstance(scales, Sequence):
        return [scales[min(depth, len(scales) - 1)] for depth in range(last + 1)]
    return [scales] * (last + 1)


def _by_depth(
    phases: Sequence[FreezePhase | tuple[int, DepthScales]], depths: PyTree
) -> tuple[tuple[FreezePhase, ...], Callable[[Params], tuple[PyTree, list[list[float]]]]]:
    """The checked phases, and params -> (their depths, factors by phase and depth)."""
    checked = _checked_phases(phases)

    def table(last: int) -> list[list[float]]:
        return [_row(phase.scales, last) for phase in checked]

    whole = None if is_function(depths) else table(_last_depth(checked_depths(depths)))
    for index, row in enumerate(whole or ()):
        # By a number or a tuple it may be meant; a function that no layer passes was made for a deeper network.
        if callable(checked[index].scales) and not any(is_traced(scale) or scale for scale in row):
            raise ValueError(
                f"phases[{index}].scales freezes all layers: the last depth is {len(row) - 1}. For a phase in which "
                "nothing learns pass 0.0."
            )

    def read(params: Params) -> tuple[PyTree, list[list[float]]]:
        here = checked_depths(align(depths, params, "depths"))
        return here, table(_last_depth(here)) if whole is None else whole

    return checked, read


def factors_by_phase(
    phases: Sequence[FreezePhase | tuple[int, DepthScales]], depths: PyTree
) -> list[tuple[int, list[float]]]:
    """For every phase its start and the factors of the depths 0, 1, ...; depths are a tree."""
    checked, read = _by_depth(phases, depths)
    return [(phase.start, row) for phase, row in zip(checked, read(depths)[1], strict=True)]


class ProgressiveFreezingState(NamedTuple):
    """State of ``progressive_freezing``: int32 scalar, updates so far, one for all leaves."""

    count: jax.Array
    serves_all_ages = True


def progressive_freezing(phases: Sequence[FreezePhase | tuple[int, DepthScales]], depths: PyTree) -> Multiplier:
    """Multiply every update by the factor that the phase of training has for the leaf's depth.

    A phase lasts from its start to the start of the next, in updates. A factor of 0 gives an update of exactly 0, of a
    NaN gradient too; as long as it stands at the end of the chain, weight decay and momentum move nothing either.

    The original's schedule, relative to its base rate of 1e-3, with epochs of ``n`` updates: a warm-up of 10 epochs,
    refinement until epoch 30 (depths 0 and 1 at 1e-5, deeper ones at 1e-4), then all but the last layer frozen::

        [(0, 1.0), (10 * n, (0.01, 0.01, 0.1)), (30 * n, oxs.frozen_below(-1, 0.1))]

    Gradual unfreezing is ``[(0, oxs.frozen_below(-1)), (n, oxs.frozen_below(-2)), (2 * n, 1.0)]``.

    The count is the run's, not the leaf's: a leaf that is grown in the last phase is in the last phase. The factors are
    data of one program: nothing is traced again with a new phase, and the backward pass of a frozen layer is still
    computed. ``freeze_at_phase`` saves it.

    Args:
      phases: in order, the first at 0. Functions of depth are called when the depths are known.
      depths: tree of ints with the structure of params (see ``layer_depths``), a prefix, or a function of params. The
        last depth is the greatest of the whole tree: inside ``optax.partition`` pass a tree.

    Returns:
      A transformation whose state is one int32 scalar.

    Raises:
      ValueError: for starts that are no ints or out of order, factors that are no numbers or negative, depths that are
        no ints or negative, and, where depths are a tree, for a function of depth by which no layer learns.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
      >>> phases = [(0, 1.0), (1, (0.5, 0.5, 1.0)), (2, oxs.frozen_below(-1, 0.5))]
      >>> tx = oxs.progressive_freezing(phases, {"a": 0, "b": 1, "c": 2})
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state)
      ...     print([float(update[0]) for update in updates.values()])
      [1.0, 1.0, 1.0]
      [0.5, 0.5, 1.0]
      [0.0, 0.0, 0.5]

    References:
      Brock et al., FreezeOut, 2017; Howard & Ruder, 2018 (gradual unfreezing).
    """
    checked, read = _by_depth(phases, depths)
    starts = np.array([phase.start for phase in checked], np.int32)

    def init_fn(params: optax.Params) -> ProgressiveFreezingState:
        read(params)
        return ProgressiveFreezingState(jnp.zeros((), jnp.int32))

    def factors_fn(
        updates: optax.Updates,
        state: ProgressiveFreezingState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, ProgressiveFreezingState]:
        del params, extra_args
        here, table = read(updates)
        row = jnp.asarray(table, jnp.float32)[jnp.sum(state.count >= starts) - 1]
        factors = every_leaf(updates, here, of=lambda depth: row[depth])
        return factors, ProgressiveFreezingState(jnp.asarray(optax.safe_increment(state.count)))

    numbers = {f"from_{start}": scales for start, scales in checked}
    return multiplier(init_fn, factors_fn, Rule("progressive_freezing", numbers, "4 B"))


def freeze_at_phase(
    inner: optax.GradientTransformation,
    phases: Sequence[FreezePhase | tuple[int, DepthScales]],
    depths: PyTree,
    *,
    phase: int,
) -> Described:
    """One phase of ``progressive_freezing``, made static, so that what it freezes costs nothing.

    Leaves whose factor in that phase is 0 are frozen as by ``freeze_labels``; the updates of the others are those of
    ``optax.chain(inner, progressive_freezing(phases, depths))`` in that phase, for an ``inner`` that works leaf by
    leaf. With the next phase build the next one, and go on from the transferred state: one compilation a phase. ::

        for phase, (start, _) in enumerate(phases):
            new_tx = oxs.freeze_at_phase(inner, phases, depths, phase=phase)
            state = oxs.transfer_state(tx, state, params, new_tx, params)

    Args:
      inner: the optimizer. What reads across leaves reads the live ones.
      phases: as for ``progressive_freezing``.
      depths: as for ``progressive_freezing``.
      phase: which of them, from 0.

    Returns:
      A transformation with the state of ``inner`` over the leaves that learn.

    Raises:
      ValueError: as ``progressive_freezing``, and for a ``phase`` that is not among them.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"first": jnp.ones(2), "last": jnp.ones(2)}
      >>> phases = [(0, 1.0), (100, oxs.frozen_below(-1, 0.1))]
      >>> tx = oxs.freeze_at_phase(optax.adam(1e-3), phases, {"first": 0, "last": 1}, phase=1)
      >>> [leaf.size for leaf in jax.tree.leaves(tx.init(params))]  # the count, and mu and nu of "last" alone
      [1, 2, 2]
    """
    checked, read = _by_depth(phases, depths)
    if not 0 <= phase < len(checked):
        raise ValueError(f"phase={phase!r} must be one of 0 .. {len(checked) - 1}.")

    def constants(params: Params) -> PyTree:
        here, table = read(params)
        return jax.tree.map(lambda depth: table[phase][depth], here)

    def labels(params: Params) -> Labels:
        return jax.tree.map(lambda factor: "frozen" if factor == 0 else "live", constants(params))

    def factors_fn(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, optax.EmptyState]:
        del params, extra_args
        return every_leaf(updates, constants(updates)), state

    numbers = {"phase": phase, "scales": checked[phase].scales}
    # Over all leaves, the frozen ones included: depths that are a function of params need to see the whole tree.
    rates = multiplier(lambda params: optax.EmptyState(), factors_fn, Rule("freeze_at_phase", numbers))
    made = optax.chain(freeze_labels(inner, "frozen", labels), rates)
    return transformation(made.init, made.update, Rule("freeze_at_phase", numbers, inner=(inner,)))
