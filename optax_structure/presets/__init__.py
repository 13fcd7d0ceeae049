"""Named recipes, built only from the public transformations: ``oxs.presets.balanced(1e-3, labels)``.

Every preset is a function that returns an ordinary ``optax.GradientTransformation``: Adam with one step count a leaf
(``inner=``), the product of its parts, clipped, and the learning rate. They differ in which parts they have and in
their numbers, which are keyword arguments; ``None`` switches a part off. What needs an extra argument of ``update``
(``extrema=``, ``event=``, ``masks=``, ``value=``) does nothing when it is not passed. ``oxs.describe`` prints a preset,
``oxs.rates`` says what it does at any step.

Epochs become updates through ``steps_per_epoch``, which the caller knows. At its default of 1 "epochs" are updates, and
a preset is at its end after a few hundred of them. Such numbers fix what is computed, so ``optax.inject_hyperparams``
takes a preset with its rate alone: ``inject_hyperparams(lambda rate: oxs.presets.basic(rate, labels))(1e-3)``.

The levels, ``structure_net`` and ``extrema_focused`` have rules of single connections and number their births by
themselves: between two of them inside ``optax.multi_transform`` a leaf cannot move.

Labels say which rate a leaf has; those that a preset does not list have the factor 1.
"""

from optax_structure.presets.control import loss_aware as loss_aware
from optax_structure.presets.levels import advanced as advanced
from optax_structure.presets.levels import basic as basic
from optax_structure.presets.levels import comprehensive as comprehensive
from optax_structure.presets.levels import ultimate as ultimate
from optax_structure.presets.styles import aggressive as aggressive
from optax_structure.presets.styles import balanced as balanced
from optax_structure.presets.styles import conservative as conservative
from optax_structure.presets.styles import extrema_focused as extrema_focused
from optax_structure.presets.styles import fine_tuning as fine_tuning
from optax_structure.presets.tasks import combined as combined
from optax_structure.presets.tasks import continual_learning as continual_learning
from optax_structure.presets.tasks import structure_net as structure_net
from optax_structure.presets.tasks import transfer_learning as transfer_learning

__all__ = [
    "advanced",
    "aggressive",
    "balanced",
    "basic",
    "combined",
    "comprehensive",
    "conservative",
    "continual_learning",
    "extrema_focused",
    "fine_tuning",
    "loss_aware",
    "structure_net",
    "transfer_learning",
    "ultimate",
]
