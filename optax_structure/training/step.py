"""The compiled side of the main job: its optimizer, and many training steps in one dispatch.

Everything that changes from step to step is in one pytree, ``Carry``; masks are in the optimizer's state. So a growth
event that changes masks alone goes on in the same program, and a checkpoint is this pytree.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree
from optax_structure.extrema import ActivationStats, init_activation_stats, update_activation_stats
from optax_structure.structure import COMPONENTS, Units
from optax_structure.training.config import Config
from optax_structure.training.network import apply_fn, loss_and_aux
from optax_structure.transforms._connection import CohortRule, CohortTable
from optax_structure.transforms.connection_rules import age_rule, component_rule
from optax_structure.transforms.connections import scale_by_connection
from optax_structure.transforms.masking import sparse
from optax_structure.transforms.per_leaf import per_leaf
from optax_structure.transforms.rewiring.rules import Rewiring, random_rewiring, rigl_rewiring, set_rewiring

CHUNK = 50
"""Steps in one dispatch; everything on the host falls on its boundaries."""

RATES = {"none": {"scaffold": 1.0, "patch": 1.0, "new": 1.0}, "dual": {"scaffold": 0.7, "patch": 1.0, "new": 1.0}}
"""Strategy -> component -> factor on the learning rate."""

SCAFFOLD_AFTER_GROWTH = {"slow": 0.1, "freeze": 0.0}

_RULES = {"set": set_rewiring, "rigl": rigl_rewiring, "random": random_rewiring}


class Carry(NamedTuple):
    """What a step changes: params, optimizer state (masks and cohorts in it) and activation statistics."""

    params: Params
    opt_state: optax.OptState
    stats: ActivationStats


class Program(NamedTuple):
    """A compiled chunk: ``run(carry, x, y, index) -> (carry, (losses, accuracies))``, and how often it was traced."""

    tx: optax.GradientTransformationExtraArgs
    run: jax.stages.Wrapped
    traces: list[int]


def after_growth_rule(factor: float, steps: int) -> CohortRule:
    """Everything older than the latest growth runs at ``factor`` of its rate for ``steps`` updates after it.

    Growth is a cohort whose component is not ``scaffold``; connections that rewiring puts in place are scaffold.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure.training.step import after_growth_rule
      >>> ages, components = jnp.array([500, 3, 1]), jnp.array([0, 2, 0], jnp.uint8)    # the second cohort is "new"
      >>> after_growth_rule(0.0, 100).factors(oxs.CohortTable(ages, 500 - ages, components)).tolist()
      [0.0, 1.0, 1.0]
    """

    def factors(table: CohortTable) -> jax.Array:
        grown = table.component != COMPONENTS.index("scaffold")
        since = jnp.min(table.age, where=grown, initial=jnp.iinfo(jnp.int32).max)
        return jnp.where((since < steps) & (table.age > since), factor, 1.0)

    return CohortRule("after_growth", factors)


def settled_rule(steps: int, factor: float) -> CohortRule:
    """What was ``new`` runs at ``factor`` of that component's rate from age ``steps`` on: it is scaffold by then.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure.training.step import settled_rule
      >>> ages, components = jnp.array([500, 30, 1]), jnp.array([1, 2, 2], jnp.uint8)    # a patch, and two "new"
      >>> settled_rule(25, 0.5).factors(oxs.CohortTable(ages, 500 - ages, components)).tolist()
      [1.0, 0.5, 1.0]
    """

    def factors(table: CohortTable) -> jax.Array:
        return jnp.where((table.component == COMPONENTS.index("new")) & (table.age >= steps), factor, 1.0)

    return CohortRule("settled", factors)


def rewiring_rule(config: Config, total_steps: int, chunk: int) -> Rewiring | None:
    """The rule of ``config.rewire``; None where nothing is to be rewired inside the step.

    It rewires in the last step of a dispatch, so that the connections of every dispatch are known.

    Example:
      >>> from optax_structure.training.config import Config
      >>> from optax_structure.training.step import rewiring_rule
      >>> rule = rewiring_rule(Config(rewire="rigl", rewire_every=120), 4000, 50)
      >>> rule.every, rule.stop
      (100, 3000)
      >>> rewiring_rule(Config(), 4000, 50) is None
      True
    """
    every, stop = whole_chunks(config.rewire_every, chunk), int(config.rewire_until * total_steps)
    if config.rewire in (None, "none") or not config.prune or stop < every:
        return None
    return _RULES[config.rewire](fraction=config.prune, every=every, stop=stop, seed=config.seed)


def whole_chunks(steps: float, chunk: int) -> int:
    """The number of steps nearest to ``steps`` that whole dispatches of ``chunk`` make; at least one dispatch."""
    return max(1, round(steps / chunk)) * chunk


def make_tx(
    config: Config, total_steps: int, masks: PyTree, rule: Rewiring | None = None
) -> optax.GradientTransformationExtraArgs:
    """The main job's optimizer: sparse AdamW, one count a leaf, a rate a connection, cosine decay.

    A connection warms up from its birth and has the rate of its component; what was grown as ``new``, inserted leaves
    included, has the scaffold's once its warm-up is over. Patches keep theirs. All of it is in the cohorts, so a leaf
    that is relabelled needs no other program.

    Args:
      config: strategy, warm-up, peak learning rate.
      total_steps: length of the cosine.
      masks: which connections exist.
      rule: by which they change inside the step.

    Returns:
      A transformation whose state holds the masks.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure.training.config import Config
      >>> from optax_structure.training.network import chain, params_like
      >>> from optax_structure.training.step import make_tx
      >>> units = chain([20, 30, 5])
      >>> params = params_like(units)
      >>> masks = oxs.random_masks(jax.random.key(0), params, 0.1)
      >>> tx = make_tx(Config(), 1000, masks)
      >>> oxs.nonzero(oxs.get_masks(tx.init(params)))
      75
    """
    rates = RATES[config.strategy]
    rules = [component_rule(**rates), settled_rule(config.warmup, rates["scaffold"] / rates["new"])]
    if config.warmup:
        rules.append(age_rule(optax.linear_schedule(1 / config.warmup, 1.0, config.warmup)))
    if config.on_growth != "none" and config.warmup:
        rules.append(after_growth_rule(SCAFFOLD_AFTER_GROWTH[config.on_growth], config.warmup))
    return sparse(
        optax.chain(
            per_leaf(optax.scale_by_adam()),
            optax.add_decayed_weights(config.weight_decay),
            scale_by_connection(*rules),
            optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, total_steps)),
            optax.scale(-config.learning_rate),
        ),
        masks,
        rewire=rule,
    )


def make_program(tx: optax.GradientTransformationExtraArgs, units: Units) -> Program:
    """The jitted, donated ``lax.scan`` over a chunk of steps, for one structure.

    ``index`` is int32 ``(steps, batch)``: the rows of each step. The data are arguments, the carry is donated.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> from optax_structure.training.network import chain, params_like
      >>> from optax_structure.training.step import Carry, first_stats, make_program
      >>> units = chain([4, 3, 2])
      >>> params = params_like(units)
      >>> tx = optax.with_extra_args_support(optax.sgd(0.1))
      >>> program = make_program(tx, units)
      >>> carry = Carry(params, tx.init(params), first_stats(params, units))
      >>> carry, (losses, _) = program.run(carry, jnp.ones((5, 4)), jnp.zeros(5, int), jnp.zeros((3, 2), int))
      >>> losses.shape, program.traces
      ((3,), [1])
    """
    traces: list[int] = []

    def chunk(carry: Carry, x: jax.Array, y: jax.Array, index: jax.Array) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        # Runs once a trace, not once a step: this is how retraces are counted.
        traces.append(1)

        def step(carry: Carry, rows: jax.Array) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
            params, opt_state, stats = carry
            (loss, (accuracy, activations)), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(
                params, units, x[rows], y[rows]
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            stats = update_activation_stats(stats, jax.lax.stop_gradient(activations))
            return Carry(optax.apply_updates(params, updates), opt_state, stats), (loss, accuracy)

        return jax.lax.scan(step, carry, index)

    return Program(tx, jax.jit(chunk, donate_argnums=0), traces)


def first_stats(params: Params, units: Units) -> ActivationStats:
    """Empty activation statistics for the hidden layers of these units.

    Example:
      >>> from optax_structure.training.network import chain, params_like
      >>> from optax_structure.training.step import first_stats
      >>> units = chain([4, 3, 2])
      >>> sorted(first_stats(params_like(units), units).active)
      ['hidden_1']
    """
    x = jax.ShapeDtypeStruct((1, units.groups[0].size), jnp.float32)
    return init_activation_stats(jax.eval_shape(apply_fn(units), params, x)[1])


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows).astype(np.int32)


def batch_rows(seed: int, first: int, steps: int, rows: int, batch_size: int) -> np.ndarray:
    """Rows of ``steps`` batches from step ``first`` on, ``(steps, batch)``: a function of the seed and the step alone.

    Every epoch is a permutation of its own, cut into whole batches.

    Example:
      >>> from optax_structure.training.step import batch_rows
      >>> batch_rows(0, 0, 2, 6, 3).shape, sorted(batch_rows(0, 0, 2, 6, 3).ravel().tolist())
      ((2, 3), [0, 1, 2, 3, 4, 5])
    """
    found = []
    for step in range(first, first + steps):
        epoch, place = divmod(step, rows // batch_size)
        found.append(_epoch_order(seed, epoch, rows)[place * batch_size : (place + 1) * batch_size])
    return np.stack(found)
