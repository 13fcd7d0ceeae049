"""One rate per connection: rules over the birth and the component of every connection.

All rules are hosted by ONE transformation. Chained, each would keep and read state of the size of the parameters;
here they share one byte a connection, and what they say is folded into one table of 256 factors that every connection
looks up: 0 to 4 % of a training step, however many rules there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align
from optax_structure.state.cohorts import ABSENT, Cohorts, first_cohort, follow
from optax_structure.structure import COMPONENTS
from optax_structure.transforms._extra import Rule, check_number, check_schedule, require
from optax_structure.transforms._multiplier import Factors, LeafGroup, Multiplier, multiplier


class ConnectionRule(NamedTuple):
    """A factor for every cohort.

    Attributes:
      name: what it is called in messages.
      factors: ``(age, component) -> factor``: int32 (256,) updates since birth, uint8 (256,) component codes ->
        float32 (256,).
    """

    name: str
    factors: Callable[[jax.Array, jax.Array], jax.Array]


def age_rule(schedule: Callable[[Any], Any]) -> ConnectionRule:
    """A connection's factor is ``schedule(age)``, its age being 0 at its first update.

    Args:
      schedule: age (int32 scalar) -> factor: ``optax.linear_schedule(0.1, 1.0, 100)`` warms new connections up,
        a decaying one settles old ones.

    Returns:
      A rule for ``scale_by_connection``.

    Raises:
      ValueError: when ``schedule`` is not callable.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> rule = oxs.age_rule(lambda age: 0.5 ** age)
      >>> rule.factors(jnp.arange(256), jnp.zeros(256, jnp.uint8))[:3].tolist()
      [1.0, 0.5, 0.25]
    """
    check_schedule("schedule", schedule, of="age")
    return ConnectionRule("age", lambda age, component: jax.vmap(schedule)(age))


def component_rule(**factors: float) -> ConnectionRule:
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
      >>> rule = oxs.component_rule(scaffold=0.1, patch=0.5)
      >>> rule.factors(jnp.zeros(256, jnp.int32), jnp.arange(256, dtype=jnp.uint8))[:3].round(3).tolist()
      [0.10000000149011612, 0.5, 1.0]
    """
    for component, factor in factors.items():
        if component not in COMPONENTS:
            raise ValueError(f"component_rule({component}=...): components are {', '.join(COMPONENTS)}.")
        check_number(component, factor)

    def table(age: jax.Array, component: jax.Array) -> jax.Array:
        del age
        by_code = jnp.ones(256, jnp.float32)
        for name, factor in factors.items():
            by_code = by_code.at[COMPONENTS.index(name)].set(factor)
        return by_code[component]

    return ConnectionRule("component", table)


def scale_by_connection(*rules: ConnectionRule) -> Multiplier:
    """Multiply the update of every connection by the product of what the rules say of it.

    Every connection belongs to a cohort (born at the same step, of one component). The rules are evaluated on the 256
    entries of the cohort tables, and each connection looks its factor up. Births enter in two ways: through
    ``transfer_state`` after a growth action, with the component that the action gave them, and inside the step when
    ``masks_changed=`` is true (rewiring), as ``scaffold``. Absent connections get 0.

    Kernels (two axes or more) hold one byte a connection; other leaves one cohort a leaf.

    Args:
      *rules: see ``age_rule`` and ``component_rule``.

    Returns:
      A transformation; it reads ``masks=`` and ``masks_changed=`` (a traced bool) when they are passed, which
      ``sparse`` does.

    Raises:
      ValueError: when an argument is no rule.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
      >>> tx = oxs.scale_by_connection(oxs.component_rule(scaffold=0.1, patch=0.5))
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
      >>> float(updates["kernel"][0, 0].round(3))
      0.10000000149011612
    """
    for rule in rules:
        if not isinstance(rule, ConnectionRule):
            raise ValueError(f"scale_by_connection takes rules such as age_rule(...), got {rule!r}.")

    def factors_fn(
        updates: optax.Updates,
        state: Cohorts,
        params: optax.Params | None = None,
        *,
        masks: PyTree | None = None,
        masks_changed: jax.Array | bool = False,
        **extra_args: Any,
    ) -> tuple[Factors, Cohorts]:
        del params, extra_args
        # Births are looked for only when told to: comparing masks with cohorts every step would cost 7 % of it.
        if masks_changed is not False:
            masks = align(require(masks, "masks", "scale_by_connection(...) with masks_changed="), updates, "masks")
            state = jax.lax.cond(jnp.asarray(masks_changed, bool), lambda s: follow(s, masks), lambda s: s, state)
        table = jnp.ones(256, jnp.float32)
        for rule in rules:
            table = table * rule.factors(state.count - state.birth, state.component).astype(jnp.float32)
        table = table.at[ABSENT].set(0.0)
        cohorts = dict(enumerate(jax.tree.leaves(state.cohort)))
        kernels = {place: table[ids.astype(jnp.int32)] for place, ids in cohorts.items() if ids.ndim}
        others = [place for place in cohorts if place not in kernels]
        ids = [cohorts[place].astype(jnp.int32) for place in others]
        whole = LeafGroup(tuple(others), (ids,), lambda cohort: table[cohort])
        return Factors((whole,), kernels), state._replace(count=optax.safe_increment(state.count))

    numbers = {rule.name: rule.factors for rule in rules}
    return multiplier(first_cohort, factors_fn, Rule("scale_by_connection", numbers, "1 B a connection"))


def scale_by_connection_age(schedule: Callable[[Any], Any]) -> Multiplier:
    """``scale_by_connection(age_rule(schedule))``.

    Args:
      schedule: age (updates since the connection was born) -> factor.

    Returns:
      A transformation with one byte of state a connection.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.scale_by_connection_age(optax.linear_schedule(0.0, 1.0, 2))
      >>> update, _ = tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))
      >>> float(update[0, 0])
      0.0
    """
    return scale_by_connection(age_rule(schedule))
