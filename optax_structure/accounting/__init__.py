"""What a network holds and what a step of it costs, as executed and as it would be if sparsity were free."""

from optax_structure.accounting.counting import Count as Count
from optax_structure.accounting.counting import Counts as Counts
from optax_structure.accounting.counting import count as count
