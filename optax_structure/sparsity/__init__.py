"""Sparse structure as data: masks and exact selection. No optimizer here."""

from __future__ import annotations

from optax_structure.sparsity.masks import apply_masks, density, is_kernel, nonzero, random_masks
from optax_structure.sparsity.topk import kth_largest, top_k_mask, top_k_mask_tree

__all__ = [
    "apply_masks",
    "density",
    "is_kernel",
    "kth_largest",
    "nonzero",
    "random_masks",
    "top_k_mask",
    "top_k_mask_tree",
]
