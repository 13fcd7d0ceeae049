"""What a rule of single connections is: a factor for every cohort, or one for every connection of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from optax_structure._tree import PyTree
from optax_structure.extrema import Extrema

Reads = Literal["params", "second_moment", "extrema"]


class CohortTable(NamedTuple):
    """What is known of the 256 cohorts; one that has no members holds what is left of the last one.

    Attributes:
      age: int32 (256,), updates since birth: 0 at a cohort's first update.
      birth: int32 (256,), the update at which it was born, 0 for what was there at ``init``.
      component: uint8 (256,), its component code (the index in ``structure.COMPONENTS``).
    """

    age: jax.Array
    birth: jax.Array
    component: jax.Array


class CohortRule(NamedTuple):
    """A factor for every cohort. However many there are, they cost one table look-up a connection.

    Attributes:
      name: what it is called in messages.
      factors: ``CohortTable -> float32 (256,)``.
    """

    name: str
    factors: Callable[[CohortTable], jax.Array]


class Kernel(NamedTuple):
    """One kernel (a leaf of two axes or more), as an element rule sees it. What the rule does not read may be None.

    Attributes:
      path: its path in params.
      shape: its shape.
      weights: its parameters, before this update.
      second_moment: running mean of its squared gradients (see ``observe``), 0 before the first update; a scalar 0
        where the optimizer keeps none for it.
      extrema: the extrema of the whole network, by layer.
      said: what the tree of the rule says of it.
    """

    path: str
    shape: tuple[int, ...]
    weights: jax.Array | None
    second_moment: jax.Array | None
    extrema: Extrema | None
    said: Any


class ElementRule(NamedTuple):
    """A factor for every connection of a kernel, computed from what is there anyway: it keeps no state.

    Elementwise, it costs no temporary; a mean over a leaf would cost one of the leaf's size.

    Attributes:
      name: what it is called in messages: the factory without ``_rule``.
      factors: ``Kernel -> factors`` that broadcast to its shape, or None where the rule has nothing to say.
      reads: what ``update`` must be given: ``"params"``, ``"second_moment"``, ``"extrema"``.
      tree: tree with the structure of params, a prefix of it or a function of params, of which each kernel sees its
        own leaf as ``said``.
      optional: whether the rule says nothing, instead of raising, when what it reads is not passed.
    """

    name: str
    factors: Callable[[Kernel], jax.Array | None]
    reads: tuple[Reads, ...]
    tree: PyTree = None
    optional: bool = False


ConnectionRule = CohortRule | ElementRule
"""What ``scale_by_connection`` takes."""


def optional_rule(rule: ElementRule) -> ElementRule:
    """The same rule, with factor 1 where what it reads is not passed to ``update``.

    Args:
      rule: one that reads something, such as ``extrema_rule(...)``.

    Returns:
      A rule for ``scale_by_connection``.

    Raises:
      ValueError: for a rule of cohorts, which reads nothing that could be missing.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.scale_by_connection(oxs.optional_rule(oxs.gradient_rule()))
      >>> float(tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))[0][0, 0])    # no second_moment= here
      1.0
    """
    if not isinstance(rule, ElementRule):
        raise ValueError(f"optional_rule takes a rule that reads something, such as gradient_rule(), got {rule!r}.")
    return rule._replace(optional=True)
