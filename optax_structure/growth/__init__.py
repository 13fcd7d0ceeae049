"""Growth actions: pure functions from a network's structure to a larger or smaller one, each returning ``Growth``."""

from __future__ import annotations

from optax_structure.growth.ablation import ablate_units
from optax_structure.growth.connections import add_connections, extrema_scores, prune_connections
from optax_structure.growth.insertion import insert_layer
from optax_structure.growth.patches import add_patches, apply_patches, embed_patches
from optax_structure.growth.widening import widen

__all__ = [
    "ablate_units",
    "add_connections",
    "add_patches",
    "apply_patches",
    "embed_patches",
    "extrema_scores",
    "insert_layer",
    "prune_connections",
    "widen",
]
