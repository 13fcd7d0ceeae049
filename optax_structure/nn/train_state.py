"""Flax's ``TrainState`` with the extra arguments that transformations read."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax
from flax.training import train_state

from optax_structure.transforms._extra import takes_extra_args


class TrainState(train_state.TrainState):
    """A ``flax.training.train_state.TrainState`` whose ``apply_gradients`` hands extra arguments to ``tx.update``.

    Flax's hands them to ``replace`` only, so that ``value=``, ``event=`` or ``extrema=`` never arrive. ``tx`` is
    static: ``state.replace(tx=...)`` compiles the step again.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_structure import nn
      >>> tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
      >>> state = nn.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
      >>> state = state.apply_gradients(grads={"w": jnp.ones(2)}, value=jnp.asarray(1.0))
      >>> int(state.step), state.params["w"].tolist()
      (1, [0.8999999761581421, 0.8999999761581421])
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
        """One step of ``tx``.

        Args:
          grads: gradients of the structure of ``params``.
          **kwargs: a field of the state (``batch_stats=`` of a subclass) is replaced by its value, as in Flax;
            everything else goes to ``tx.update``.

        Returns:
          The state one step on.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        extra = {name: value for name, value in kwargs.items() if name not in fields}
        update = takes_extra_args(self.tx).update
        bound = optax.GradientTransformation(
            self.tx.init, lambda updates, state, params=None: update(updates, state, params, **extra)
        )
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        stepped = super(TrainState, self.replace(tx=bound)).apply_gradients(grads=grads, **replaced)
        return stepped.replace(tx=replaced.get("tx", self.tx))
