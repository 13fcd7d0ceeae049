"""Gates in Flax models as they are."""

from optax_structure.nn.gating.models import gate_model as gate_model
