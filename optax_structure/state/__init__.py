"""Optimizer state through relabelling, growth and pruning, for arbitrary optax chains.

``transfer.py`` is the public side. Behind it, in the order in which a transfer runs: ``slots.py`` reads what each array
of a state is, ``planning.py`` decides which old array each new one continues, ``moving.py`` does the array work in one
jitted function, ``carrying.py`` puts the three together. ``markers.py`` and ``cohorts.py`` are the state nodes with a
meaning of their own, from which the transforms build their states.
"""

from __future__ import annotations

from optax_structure.state.transfer import get_masks, hyperparams_by_label, reset_state, transfer_state

__all__ = ["get_masks", "hyperparams_by_label", "reset_state", "transfer_state"]
