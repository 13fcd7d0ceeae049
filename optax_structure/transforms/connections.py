"""One rate per connection: the host of all rules of single connections, and what it knows of each of them.

All rules are hosted by ONE transformation. Chained, each would keep and read state of the size of the parameters;
here they share one byte a connection. What the rules of cohorts say is folded into one table of 256 factors that every
connection looks up, and what the others say is computed from weights and moments that are there anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align, leaves_by_path
from optax_structure.extrema import Extrema
from optax_structure.state.cohorts import ABSENT, Cohorts, first_cohort, follow
from optax_structure.transforms._connection import CohortRule, CohortTable, ConnectionRule, ElementRule, Kernel
from optax_structure.transforms._extra import Rule, require
from optax_structure.transforms._multiplier import Factors, LeafGroup, Multiplier, multiplier, whole_path
from optax_structure.transforms.connection_rules import age_rule

_SOURCES = {
    "params": "",
    "second_moment": " outside of observe(an optimizer that keeps second moments: adam, adamw, lamb, rmsprop ...)",
    "extrema": "",
}


def _heard(rule: ElementRule, given: dict[str, Any]) -> bool:
    """Whether everything that the rule reads was passed; raises where it was not, unless the rule is optional."""
    for name in rule.reads:
        if given[name] is None:
            if rule.optional:
                return False
            call = f"scale_by_connection({rule.name}_rule(...)){_SOURCES[name]}"
            if name == "params":
                raise ValueError(f"{call} needs params: call tx.update(grads, state, params).")
            require(None, name, call)
    return True


def _kernels(rules: list[ElementRule], updates: optax.Updates, given: dict[str, Any]) -> list[list[Kernel]]:
    """What each rule sees, for every leaf."""

    def leaves(tree: PyTree, name: str) -> list[Any]:
        return [None] * len(shapes) if tree is None else jax.tree.leaves(align(tree, updates, name))

    shapes = [(whole_path(path), jnp.shape(leaf)) for path, leaf in leaves_by_path(updates).items()]
    weights, moments = leaves(given["params"], "params"), leaves(given["second_moment"], "second_moment")
    return [
        [
            Kernel(path, shape, weight, moment, given["extrema"], said)
            for (path, shape), weight, moment, said in zip(
                shapes, weights, moments, leaves(rule.tree, f"the tree of {rule.name}_rule"), strict=True
            )
        ]
        for rule in rules
    ]


def scale_by_connection(*rules: ConnectionRule) -> Multiplier:
    """Multiply the update of every connection by the product of what the rules say of it.

    Every connection belongs to a cohort (born at the same step, of one component). The rules of cohorts
    (``component_rule``, ``age_rule``, ``birth_rule``) are evaluated on the 256 entries of the cohort tables, and each
    connection looks its factor up. The others (``strength_rule``, ``scale_rule``, ``gradient_rule``, ``extrema_rule``)
    give every connection of a kernel a factor of its own.

    Births enter in two ways: through ``transfer_state`` after a growth action, with the component that the action gave
    them, and inside the step when ``masks_changed=`` is true (rewiring), as ``scaffold``. When the 255 ids are used up,
    one without members is used again, or else the two oldest cohorts of one component become one. Absent connections
    get 0.

    ``optax.MultiSteps`` updates what it holds with what is passed at the last of its small steps: inside it, a
    ``masks_changed=`` that is true at another one is lost. So keep this outside,
    ``optax.chain(optax.MultiSteps(inner, n), rates)``, or accumulate in the loop: ``fit(accumulate=n)``.

    Kernels (two axes or more) hold one byte a connection, whatever the rules; other leaves hold one cohort a leaf and
    have the factors of cohorts alone.

    Args:
      *rules: see above; a rule of one's own is a ``CohortRule`` or an ``ElementRule``.

    Returns:
      A transformation; it reads ``masks=`` and ``masks_changed=`` (a traced bool) when they are passed, which
      ``sparse`` does, and what its rules read: ``params``, ``second_moment=`` (which ``observe`` hands on),
      ``extrema=``. ``optional_rule(rule)`` does without.

    Raises:
      ValueError: when an argument is no rule; in ``update``, when something that a rule reads is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"kernel": jnp.array([[0.75, 0.25], [0.05, 0.25]]), "bias": jnp.zeros(2)}
      >>> tx = oxs.scale_by_connection(oxs.component_rule(scaffold=0.5, patch=0.75), oxs.strength_rule())
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> updates["kernel"].tolist(), updates["bias"].tolist()
      ([[0.25, 0.5], [1.0, 0.5]], [0.5, 0.5])
    """
    for rule in rules:
        if not isinstance(rule, ConnectionRule):
            raise ValueError(f"scale_by_connection takes rules such as age_rule(...), got {rule!r}.")
    of_cohorts = [rule for rule in rules if isinstance(rule, CohortRule)]
    of_elements = [rule for rule in rules if isinstance(rule, ElementRule)]

    def factors_fn(
        updates: optax.Updates,
        state: Cohorts,
        params: optax.Params | None = None,
        *,
        masks: PyTree | None = None,
        masks_changed: jax.Array | bool = False,
        second_moment: PyTree | None = None,
        extrema: Extrema | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, Cohorts]:
        del extra_args
        # Births are looked for only when told to: comparing masks with cohorts every step would cost 7 % of it.
        if masks_changed is not False:
            masks = align(require(masks, "masks", "scale_by_connection(...) with masks_changed="), updates, "masks")
            state = jax.lax.cond(jnp.asarray(masks_changed, bool), lambda s: follow(s, masks), lambda s: s, state)
        facts = CohortTable(state.count - state.birth, state.birth, state.component)
        table = jnp.ones(256, jnp.float32)
        for rule in of_cohorts:
            table = table * rule.factors(facts).astype(jnp.float32)
        table = table.at[ABSENT].set(0.0)
        cohorts = dict(enumerate(jax.tree.leaves(state.cohort)))
        # An id is one byte and the table has 256 entries: no index is out of bounds, and none has to be checked.
        kernels = {place: table.at[ids].get(mode="promise_in_bounds") for place, ids in cohorts.items() if ids.ndim}
        given = {"params": params, "second_moment": second_moment, "extrema": extrema}
        heard = [rule for rule in of_elements if _heard(rule, given)]
        for rule, seen in zip(heard, _kernels(heard, updates, given), strict=True):
            for place, factor in kernels.items():
                said = rule.factors(seen[place])
                kernels[place] = factor if said is None else factor * said
        others = [place for place in cohorts if place not in kernels]
        ids = [cohorts[place] for place in others]
        whole = LeafGroup(tuple(others), (ids,), lambda id: table.at[id].get(mode="promise_in_bounds"))
        return Factors((whole,), kernels), state._replace(count=optax.safe_increment(state.count))

    numbers: dict[str, Any] = {}
    for rule in rules:
        again = sum(name.split()[0] == rule.name for name in numbers)
        numbers[f"{rule.name} {again + 1}" if again else rule.name] = rule.factors
    return multiplier(first_cohort, factors_fn, Rule("scale_by_connection", numbers, "1 B a connection"))


def scale_by_connection_age(schedule: Callable[[Any], Any]) -> Multiplier:
    """``scale_by_connection(age_rule(schedule))``.

    Args:
      schedule: age (updates since the connection was born) -> factor.

    Returns:
      A transformation with one byte of state a connection.

    Raises:
      ValueError: when ``schedule`` is not callable.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.scale_by_connection_age(optax.linear_schedule(0.0, 1.0, 2))
      >>> update, _ = tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))
      >>> float(update[0, 0])
      0.0
    """
    return scale_by_connection(age_rule(schedule))


def _cohorts_in(state: optax.OptState) -> Cohorts:
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Cohorts))
    found = [node for node in nodes if isinstance(node, Cohorts)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} scale_by_connection states; pass the state of an optimizer that "
            "has one (of several: the part of the state that is meant)."
        )
    return found[0]


def _of_connections(state: optax.OptState, masks: PyTree | None, absent: int, facts: Callable[..., PyTree]) -> PyTree:
    """What the table of ``facts(cohorts)`` says of every connection, ``absent`` where none exists."""
    cohorts = _cohorts_in(state)
    # Under per_leaf every leaf has tables of its own, else all read the same.
    tables = align(facts(cohorts), cohorts.cohort, "the tables of the cohorts")

    def look_up(ids: jax.Array, table: jax.Array, mask: jax.Array | bool) -> jax.Array:
        missing = (ids == ABSENT) | ~jnp.asarray(mask)
        return jnp.where(missing, jnp.asarray(absent, table.dtype), table[ids.astype(jnp.int32)])

    return jax.tree.map(
        look_up, cohorts.cohort, tables, align(True if masks is None else masks, cohorts.cohort, "masks")
    )


def connection_ages(state: optax.OptState, masks: PyTree | None = None) -> PyTree:
    """How many updates ago every connection was born: what an ``age_rule`` will read at the next update.

    Args:
      state: of an optimizer with one ``scale_by_connection`` anywhere in it.
      masks: which connections exist, where the state was never told (without ``sparse`` it learns of them at the first
        ``masks_changed=``).

    Returns:
      Tree with the structure of params: int32, an array of its shape for a kernel and a scalar for another leaf; -1
      where there is no connection.

    Raises:
      ValueError: when the state holds no ``scale_by_connection``, or several.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.scale_by_connection()
      >>> params = {"kernel": jnp.ones((1, 2))}
      >>> _, state = tx.update(params, tx.init(params))
      >>> oxs.connection_ages(state, {"kernel": jnp.array([[True, False]])})["kernel"].tolist()
      [[1, -1]]
    """
    return _of_connections(
        state, masks, -1, lambda c: jax.tree.map(lambda birth, count: count - birth, c.birth, c.count)
    )


def connection_components(state: optax.OptState, masks: PyTree | None = None) -> PyTree:
    """The component of every connection, as its code: the index in ``structure.COMPONENTS``.

    Args:
      state: as in ``connection_ages``.
      masks: as in ``connection_ages``.

    Returns:
      Tree with the structure of params: uint8, shaped as in ``connection_ages``; 255 where there is no connection.

    Raises:
      ValueError: when the state holds no ``scale_by_connection``, or several.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> state = oxs.scale_by_connection().init({"kernel": jnp.ones((1, 2))})
      >>> oxs.connection_components(state)["kernel"].tolist()
      [[0, 0]]
    """
    return _of_connections(state, masks, ABSENT, lambda cohorts: cohorts.component)
