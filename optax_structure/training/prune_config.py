"""What a pruning run is asked to do: one frozen record, checked when it is made, stored in the checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from optax_structure.training.config import Config
from optax_structure.training.run_state import lengths
from optax_structure.transforms.rewiring.pruning import magnitude_pruning
from optax_structure.transforms.rewiring.rules import Rewiring
from optax_structure.transforms.rewiring.scores import at_random, by_magnitude, by_saliency

By = Literal["magnitude", "saliency", "random"]
Distribution = Literal["erk", "uniform", "global"]

_SCORES = {"magnitude": by_magnitude, "saliency": by_saliency, "random": at_random}


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """A pruning run. Bad values raise ``ValueError``.

    Attributes:
      widths: units of the hidden layers, at least one, each > 0.
      final_density: share of the dense network's kernel weights that is left, in (0, 1): met exactly.
      by: what goes first: the smallest ``|weight|`` (``magnitude``), the smallest ``|weight * gradient|`` of one batch
        (``saliency``), or anything (``random``).
      distribution: how the share is divided among the kernels: small ones denser (``erk``), alike (``uniform``), or as
        it falls when all connections compete (``global``).
      start, stop: shares of the training between which pruning happens, ``0 <= start < stop <= 1``. The number of
        connections falls along a cubic, fast at first.
      events: how many prunings there are at most, evenly spread, >= 1.
      epochs: passes over the training part; ``None``: 30, or as many as make 4,000 steps where that is more.
      seed, batch_size, learning_rate, weight_decay: as in ``Config``.

    Example:
      >>> from optax_structure.training.prune_config import PruneConfig
      >>> PruneConfig(start=0.6, stop=0.5)
      Traceback (most recent call last):
      ValueError: start=0.6 and stop=0.5 must satisfy 0 <= start < stop <= 1: they are shares of the training.
    """

    widths: tuple[int, ...] = (64, 32)
    final_density: float = 0.1
    by: By = "magnitude"
    distribution: Distribution = "erk"
    start: float = 0.1
    stop: float = 0.6
    events: int = 20
    epochs: int | None = None
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.final_density < 1:
            raise ValueError(f"final_density={self.final_density} must lie in (0, 1): it is the share that is left.")
        for name, kind in (("by", By), ("distribution", Distribution)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(get_args(kind))}.")
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"start={self.start} and stop={self.stop} must satisfy 0 <= start < stop <= 1: they are shares of the "
                "training."
            )
        if self.events < 1:
            raise ValueError(f"events={self.events} must be at least 1: it is the number of prunings.")
        self.dense()

    def dense(self) -> Config:
        """The main job's configuration of the network before pruning, and of the control that is never pruned.

        Example:
          >>> from optax_structure.training.prune_config import PruneConfig
          >>> PruneConfig(final_density=0.05).dense().density
          1.0
        """
        return Config(
            self.widths, density=1.0, final_density=1.0, events=0, prune=0.0, strategy="none", epochs=self.epochs,
            seed=self.seed, batch_size=self.batch_size, learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
        )  # fmt: skip

    def rule(self, rows: int) -> Rewiring:
        """When what is pruned, in a training on ``rows`` rows; in last steps of dispatches, where the loop counts.

        Raises:
          ValueError: where less than one dispatch lies between ``start`` and ``stop``.

        Example:
          >>> from optax_structure.training.prune_config import PruneConfig
          >>> rule = PruneConfig().rule(1294)    # 4,000 steps
          >>> rule.start, rule.every, rule.stop
          (400, 100, 2400)
        """
        total, chunk = lengths(self.dense(), rows)
        first, last = (int(share * total) // chunk for share in (self.start, self.stop))
        if last <= first:
            raise ValueError(
                f"start={self.start} and stop={self.stop} leave less than a dispatch of {chunk} steps between them: "
                f"put them further apart in the {total} steps."
            )
        every = -(-(last - first) // self.events)
        return magnitude_pruning(
            self.final_density,
            every=every * chunk,
            start=first * chunk,
            stop=last * chunk,
            distribution="uniform" if self.distribution == "global" else self.distribution,
            per="tree" if self.distribution == "global" else "leaf",
            score=_SCORES[self.by],
            seed=self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """A dict that JSON can hold; ``from_json`` is the inverse.

        Example:
          >>> from optax_structure.training.prune_config import PruneConfig
          >>> PruneConfig.from_json(PruneConfig(seed=3).to_json()) == PruneConfig(seed=3)
          True
        """
        return {**dataclasses.asdict(self), "widths": list(self.widths)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PruneConfig:
        """The inverse of ``to_json``.

        Example:
          >>> from optax_structure.training.prune_config import PruneConfig
          >>> PruneConfig.from_json({"widths": [8]}).widths
          (8,)
        """
        return cls(**{**record, **({"widths": tuple(record["widths"])} if "widths" in record else {})})
