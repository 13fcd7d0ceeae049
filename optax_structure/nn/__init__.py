"""Flax layers, models and capture for sparse networks: NNX here, Linen in ``nn.linen``. The root does not import it."""

from __future__ import annotations

from optax_structure.nn import linen
from optax_structure.nn.capture import capture
from optax_structure.nn.fast import BlockLinear, FanInLinear, Index, to_blocks, to_fan_in, to_masked
from optax_structure.nn.functional import masked_conv, masked_dense
from optax_structure.nn.gating import gate_model
from optax_structure.nn.initialisers import lsuv, sparse_init, sparse_init_tree
from optax_structure.nn.layers import SparseConv, SparseLinear
from optax_structure.nn.masks import Mask, masks_of, set_masks
from optax_structure.nn.models import MLP, Flatten
from optax_structure.nn.train_state import TrainState

__all__ = [
    "Mask",
    "SparseLinear",
    "SparseConv",
    "BlockLinear",
    "FanInLinear",
    "Index",
    "to_blocks",
    "to_fan_in",
    "to_masked",
    "MLP",
    "Flatten",
    "masks_of",
    "set_masks",
    "capture",
    "gate_model",
    "lsuv",
    "sparse_init",
    "sparse_init_tree",
    "masked_dense",
    "masked_conv",
    "TrainState",
    "linen",
]
