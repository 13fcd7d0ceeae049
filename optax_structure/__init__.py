"""Train networks whose structure matters or changes: ``import optax_structure as oxs``.

Everything that acts on gradients is an ``optax.GradientTransformation``; everything that changes structure is a pure
function on pytrees. Layers and models for Flax are in ``optax_structure.nn``, which this page does not import.
"""

from optax_structure.extrema import ActivationStats as ActivationStats
from optax_structure.extrema import Extrema as Extrema
from optax_structure.extrema import extrema_counts as extrema_counts
from optax_structure.extrema import extrema_over as extrema_over
from optax_structure.extrema import find_extrema as find_extrema
from optax_structure.extrema import init_activation_stats as init_activation_stats
from optax_structure.extrema import update_activation_stats as update_activation_stats
from optax_structure.growth import add_connections as add_connections
from optax_structure.growth import add_patches as add_patches
from optax_structure.growth import apply_patches as apply_patches
from optax_structure.growth import embed_patches as embed_patches
from optax_structure.growth import extrema_scores as extrema_scores
from optax_structure.growth import insert_layer as insert_layer
from optax_structure.growth import prune_connections as prune_connections
from optax_structure.growth import widen as widen
from optax_structure.labels import label_by_path as label_by_path
from optax_structure.labels import label_counts as label_counts
from optax_structure.labels import layer_depths as layer_depths
from optax_structure.labels import relabel as relabel
from optax_structure.sparsity.masks import apply_masks as apply_masks
from optax_structure.sparsity.masks import density as density
from optax_structure.sparsity.masks import is_kernel as is_kernel
from optax_structure.sparsity.masks import nonzero as nonzero
from optax_structure.sparsity.masks import random_masks as random_masks
from optax_structure.sparsity.topk import kth_largest as kth_largest
from optax_structure.sparsity.topk import top_k_mask as top_k_mask
from optax_structure.sparsity.topk import top_k_mask_tree as top_k_mask_tree
from optax_structure.state import get_masks as get_masks
from optax_structure.state import hyperparams_by_label as hyperparams_by_label
from optax_structure.state import reset_state as reset_state
from optax_structure.state import transfer_state as transfer_state
from optax_structure.structure import Growth as Growth
from optax_structure.structure import Patch as Patch
from optax_structure.structure import UnitAxis as UnitAxis
from optax_structure.structure import UnitGroup as UnitGroup
from optax_structure.structure import Units as Units
from optax_structure.structure import conv_chain as conv_chain
from optax_structure.structure import dense_chain as dense_chain
from optax_structure.transforms.connections import ConnectionRule as ConnectionRule
from optax_structure.transforms.connections import age_rule as age_rule
from optax_structure.transforms.connections import component_rule as component_rule
from optax_structure.transforms.connections import scale_by_connection as scale_by_connection
from optax_structure.transforms.connections import scale_by_connection_age as scale_by_connection_age
from optax_structure.transforms.masking import keep_masked as keep_masked
from optax_structure.transforms.masking import mask_gradients as mask_gradients
from optax_structure.transforms.masking import sparse as sparse
from optax_structure.transforms.per_leaf import per_leaf as per_leaf
from optax_structure.transforms.scaling import scale_by_age as scale_by_age
from optax_structure.transforms.scaling import scale_by_density as scale_by_density
from optax_structure.transforms.scaling import scale_by_depth as scale_by_depth
from optax_structure.transforms.scaling import scale_by_label as scale_by_label

__version__ = "0.1.0"
