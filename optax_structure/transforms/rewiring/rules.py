"""The rules: what ``sparse(inner, masks, rewire=...)`` takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure._tree import Params, PyTree, is_masked, is_traced, leaves_by_path
from optax_structure.sparsity.patterns import Pattern, Single
from optax_structure.transforms._extra import check_number
from optax_structure.transforms.rewiring.budgets import Budget, InProportion, Kept
from optax_structure.transforms.rewiring.scores import Score, at_random, by_gradient, by_magnitude

Fraction = float | Callable[[Array], Array]


class Rewiring(NamedTuple):
    """Which connections go and come, how many of them, and when. Build it with ``rewiring`` or a named rule.

    Attributes:
      drop: what the connections that exist are ranked by: the lowest go. None: none ever goes.
      grow: what the absent ones are ranked by: the highest come. None: none ever comes.
      fraction: the share of the connections that is replaced: a float, which falls to 0 along a cosine where there is a
        ``stop``, or a schedule of the update's number.
      budget: how many there are to be afterwards.
      every, start, stop: updates ``start + every, start + 2 * every, ...`` rewire, up to and with ``stop``.
      per: ``"leaf"``: every leaf ranks its own; ``"tree"``: all leaves compete.
      pattern: which connections go and come together.
      accumulate: over how many of the last gradients the one that ``grow`` sees is the mean.
      seed: of what is drawn at random: an int, or a JAX random key.
    """

    drop: Score | None
    grow: Score | None
    fraction: Fraction
    budget: Budget
    every: int
    start: int
    stop: int | None
    per: Literal["leaf", "tree"]
    pattern: Pattern
    accumulate: int
    seed: Any

    def is_due(self, count: Array) -> Array:
        """Whether update ``count`` rewires."""
        due = (count > self.start) & ((count - self.start) % self.every == 0)
        return due if self.stop is None else due & (count <= self.stop)

    def progress(self, count: Array) -> Array:
        """0 at ``start``, 1 at the last rewiring; 0 where there is none."""
        if self.stop is None:
            return jnp.zeros((), jnp.float32)
        last = (self.stop - self.start) // self.every * self.every
        return jnp.clip((count - self.start) / last, 0.0, 1.0).astype(jnp.float32)

    def fraction_at(self, count: Array) -> Array:
        """The share that the rewiring in update ``count`` replaces."""
        if callable(self.fraction):
            return jnp.asarray(self.fraction(count), jnp.float32)
        if self.stop is None:
            return jnp.asarray(self.fraction, jnp.float32)
        return self.fraction * 0.5 * (1 + jnp.cos(math.pi * (count - self.start) / (self.stop - self.start)))

    def shown(self) -> dict[str, Any]:
        """For ``describe``."""
        names = {part: getattr(score, "__name__", score) for part, score in (("drop", self.drop), ("grow", self.grow))}
        times = {"every": self.every, "start": self.start, "stop": self.stop}
        replaces = is_traced(self.fraction) or self.fraction
        return names | ({"fraction": self.fraction} if replaces else {"budget": self.budget}) | times

    def key(self) -> Array:
        """Of all that is drawn."""
        if not jnp.ndim(self.seed) and jnp.issubdtype(jnp.result_type(self.seed), jnp.integer):
            return jax.random.key(self.seed)
        is_key = jnp.issubdtype(self.seed.dtype, jax.dtypes.prng_key)
        return self.seed if is_key else jax.random.wrap_key_data(self.seed)

    def check(self, params: Params, masks: PyTree) -> None:
        """Raise ``ValueError`` where the rule and the masks do not fit each other, naming the leaf."""
        sparse = {path: mask for path, mask in leaves_by_path(masks).items() if np.ndim(mask)}
        hidden = any(is_masked(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_masked))
        if not sparse and not hidden:  # a group of optax.partition may well hold biases alone
            raise ValueError("rewire= has nothing to rewire: every mask is the scalar True. See random_masks.")
        for path, mask in sparse.items():
            self.pattern.check(path, mask.shape)
            with jax.ensure_compile_time_eval():  # under jit(tx.init) too
                holds = is_traced(mask) or bool(self.pattern.holds(jnp.asarray(mask)))
            if not holds:
                raise ValueError(
                    f"masks: {path!r} does not have the pattern {self.pattern}: make it with "
                    "random_masks(..., pattern=)."
                )
        if sparse:
            shapes = {path: mask.shape for path, mask in sparse.items()}
            self.budget.targets(params, shapes, {path: self.pattern.cells(shape) for path, shape in shapes.items()})


def rewiring(
    drop: Score | None = by_magnitude,
    grow: Score | None = by_gradient,
    *,
    fraction: Fraction = 0.3,
    budget: Budget | None = None,
    every: int = 100,
    start: int = 0,
    stop: int | None = None,
    per: Literal["leaf", "tree"] = "leaf",
    pattern: Pattern | None = None,
    accumulate: int = 1,
    seed: Any = 0,
) -> Rewiring:
    """A rule of your own: any way to rank what goes, any to rank what comes, and how many of them.

    In each rewiring ``round_down(fraction * connections)`` of a leaf (what is left over in rounding goes by turns) are
    dropped, those with the lowest ``drop`` score, and as many come, those with the highest ``grow`` score among the
    ones that were absent before: what was just dropped does not come back at once. A new connection starts at exactly
    0, without a past in the optimizer's state, and takes part in that same update: no step is lost.

    Args:
      drop, grow: ``leaf -> float32`` scores of the leaf's shape, see ``ScoredLeaf``: ``by_magnitude``, ``by_gradient``,
        ``by_saliency``, ``at_random`` or a function of yours. ``None``: none ever goes (comes).
      fraction: the share that is replaced, in [0, 1], falling to 0 along a cosine where there is a ``stop``; or a
        schedule ``update number -> share``.
      budget: how many connections there are to be; as many as there are where nothing is said. The named rules
        ``magnitude_pruning`` and ``proportional_growth`` have others.
      every: updates between rewirings, at least 1.
      start: the first rewiring comes ``every`` updates after this one, >= 0.
      stop: the last update that may rewire; ``None``: no end.
      per: ``"leaf"``: every leaf keeps its number; ``"tree"``: all leaves compete, in scores as they are.
      pattern: ``tiles(...)``, ``constant_fan_in()``, ``groups_of(m)``: the masks must have it from the start.
      accumulate: ``grow`` sees the mean of so many of the last gradients, from 1 (that of one batch) to ``every``.
        Above 1 it costs 4 bytes a weight, and in those updates one more pass over them.
      seed: of what is drawn at random: an int, or a JAX random key (which may be traced: one a member of ``vmap``).

    Returns:
      A rule, to be passed as ``sparse(inner, masks, rewire=rule)``.

    Raises:
      ValueError: for numbers out of range, a ``stop`` that leaves no rewiring, ``per="tree"`` with a pattern, scores
        that cannot be called.

    Example:
      >>> import optax, optax_structure as oxs
      >>> def recent_and_small(leaf):
      ...     return oxs.by_magnitude(leaf) + 0.1 * oxs.by_saliency(leaf)
      >>> rule = oxs.rewiring(recent_and_small, oxs.at_random, fraction=0.2, every=50, stop=2000)

    References:
      Evci et al., Rigging the lottery: making all tickets winners, 2020.
    """
    for name, score in (("drop", drop), ("grow", grow)):
        if score is not None and not callable(score):
            raise ValueError(f"{name}={score!r} must be a function leaf -> scores, such as oxs.by_magnitude, or None.")
    if drop is None and grow is None:
        raise ValueError("drop=None, grow=None changes nothing: leave rewire= out.")
    if not callable(fraction):
        check_number("fraction", fraction, high=1.0)
    if not (drop and grow) and not is_traced(fraction) and fraction:
        raise ValueError(f"fraction={fraction!r} is replaced, so it needs drop= and grow=; pass fraction=0.0.")
    _check_times(every, start, stop)
    if not (jnp.ndim(seed) or isinstance(seed, int | np.integer | jax.Array)) or isinstance(seed, bool):
        raise ValueError(f"seed={seed!r} must be an int or a JAX random key.")
    if per not in ("leaf", "tree"):
        raise ValueError(f"per={per!r} must be 'leaf' or 'tree'.")
    if per == "tree" and pattern is not None:
        raise ValueError(f"per='tree' lets all connections compete, so pattern={pattern!r} must be None.")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int | np.integer) or not 1 <= accumulate <= every:
        raise ValueError(
            f"accumulate={accumulate!r} must be an integer from 1 to every={every}: a number of gradients."
        )
    return Rewiring(
        drop, grow, fraction, budget or Kept(), every, start, stop, per, pattern or Single(), accumulate, seed
    )


def _check_times(every: Any, start: Any, stop: Any) -> None:
    for name, value, least in (("every", every, 1), ("start", start, 0), ("stop", stop, 0)):
        if name == "stop" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}: a number of updates.")
    if stop is not None and stop < start + every:
        raise ValueError(
            f"stop={stop} comes before the first rewiring, in update start + every = {start + every}: nothing would "
            "ever be rewired."
        )


def set_rewiring(
    *, fraction: Fraction = 0.3, every: int = 100, start: int = 0, stop: int | None = None, **more: Any
) -> Rewiring:
    """SET: the weakest connections go, others come at random.

    Args:
      fraction, every, start, stop: see ``rewiring``.
      more: ``per``, ``pattern``, ``seed`` of ``rewiring``.

    Returns:
      A rule, to be passed as ``sparse(inner, masks, rewire=rule)``.

    Raises:
      ValueError: as ``rewiring``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> masks = oxs.random_masks(jax.random.key(0), params, 0.5)
      >>> tx = oxs.sparse(optax.adam(1e-3), masks, rewire=oxs.set_rewiring(every=2))
      >>> params = oxs.apply_masks(params, masks)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      >>> after = oxs.get_masks(state)["kernel"]
      >>> oxs.nonzero(after), int((after & ~masks["kernel"]).sum())
      (32, 10)

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018.
    """
    return rewiring(by_magnitude, at_random, fraction=fraction, every=every, start=start, stop=stop, **more)


def rigl_rewiring(
    *, fraction: Fraction = 0.3, every: int = 100, start: int = 0, stop: int | None = None, **more: Any
) -> Rewiring:
    """RigL: the weakest connections go, those with the largest gradients come.

    The gradient is the one of the step, which is dense already: there is no second backward pass. A layer that
    multiplies by its mask hides it: see ``by_gradient``. The original counts what was just dropped among those that may
    come, and does without the update of the steps that rewire; here neither.

    Args:
      fraction, every, start, stop: see ``rewiring``. The original takes 0.3, 100, 0 and three quarters of the training.
      more: ``per``, ``pattern``, ``accumulate``, ``seed`` of ``rewiring``.

    Returns:
      A rule, to be passed as ``sparse(inner, masks, rewire=rule)``.

    Raises:
      ValueError: as ``rewiring``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> params, mask = {"kernel": jnp.array([[1.0, 2.0, 0.0, 0.0]])}, jnp.array([[True, True, False, False]])
      >>> tx = oxs.sparse(optax.sgd(1.0), {"kernel": mask}, rewire=oxs.rigl_rewiring(fraction=0.5, every=1))
      >>> grads = {"kernel": jnp.array([[0.0, 0.0, 0.1, -0.5]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, 2.0, 0.0, 0.5]]

    References:
      Evci et al., Rigging the lottery: making all tickets winners, 2020.
    """
    return rewiring(by_magnitude, by_gradient, fraction=fraction, every=every, start=start, stop=stop, **more)


def random_rewiring(
    *, fraction: Fraction = 0.3, every: int = 100, start: int = 0, stop: int | None = None, **more: Any
) -> Rewiring:
    """Connections go at random and come at random: the control that any other rule has to beat.

    Args:
      fraction, every, start, stop: see ``rewiring``.
      more: ``per``, ``pattern``, ``seed`` of ``rewiring``.

    Returns:
      A rule, to be passed as ``sparse(inner, masks, rewire=rule)``.

    Raises:
      ValueError: as ``rewiring``.

    Example:
      >>> import optax_structure as oxs
      >>> oxs.random_rewiring(fraction=0.1).every
      100

    References:
      Liu et al., Do we actually need dense over-parameterization?, 2021 (ITOP).
    """
    return rewiring(at_random, at_random, fraction=fraction, every=every, start=start, stop=stop, **more)


def proportional_growth(
    rate: float,
    *,
    density: float = 1.0,
    grow: Score = by_gradient,
    every: int = 100,
    start: int = 0,
    stop: int | None = None,
    **more: Any,
) -> Rewiring:
    """Every leaf grows by a share of the connections that it has, up to a density.

    Args:
      rate: connections that come for each that exists, in a rewiring, > 0.
      density: which no leaf passes, in (0, 1].
      grow: what comes first: ``by_gradient``, ``at_random``, or a function of yours.
      every, start, stop: see ``rewiring``.
      more: ``pattern``, ``accumulate``, ``seed`` of ``rewiring``.

    Returns:
      A rule, to be passed as ``sparse(inner, masks, rewire=rule)``.

    Raises:
      ValueError: for numbers out of range, and as ``rewiring``.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"kernel": jnp.ones((10, 10))}
      >>> masks = oxs.random_masks(jax.random.key(0), params, 0.1)
      >>> rule = oxs.proportional_growth(0.5, density=0.2, every=1)
      >>> tx = oxs.sparse(optax.sgd(0.1), masks, rewire=rule)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state, params)
      ...     print(oxs.nonzero(oxs.get_masks(state)))
      15
      20
      20
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density!r} must be in (0, 1], the share of connections that exist.")
    if not rate > 0:
        raise ValueError(f"rate={rate!r} must be above 0: 0.1 adds a tenth of what exists.")
    if more.get("per", "leaf") != "leaf":
        raise ValueError(f"per={more['per']!r}: every leaf grows by its own number; leave it out.")
    budget = InProportion(rate, density)
    return rewiring(None, grow, fraction=0.0, budget=budget, every=every, start=start, stop=stop, **more)
