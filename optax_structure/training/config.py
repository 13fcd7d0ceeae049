"""What a growing run is asked to do: one frozen record, checked when it is made, stored in the checkpoint."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

Action = Literal["connections", "patches", "widen", "insert"]
Placement = Literal["extrema", "random", "gradient"]
Strategy = Literal["none", "dual"]
OnGrowth = Literal["none", "slow", "freeze"]
Rewire = Literal["none", "set", "rigl", "random"]

EPOCHS = 30
MIN_STEPS = 4000


@dataclasses.dataclass(frozen=True)
class Config:
    """A growing run. Every field is a number, a string or a tuple of them; bad values raise ``ValueError``.

    Attributes:
      widths: units of the hidden layers, at least one, each > 0.
      density: share of the kernel weights that exist at the start, in (0, 1].
      final_density: share, of the INITIAL shape's dense kernel weights, that exist at the end, in (0, 1]: a hard
        budget, met exactly whatever was widened, inserted or patched on the way.
      events: number of growth events, >= 0; 0 only where ``final_density == density``.
      actions: what the events do, taken in turn: ``connections``, ``patches``, ``widen``, ``insert``.
      placement: where capacity goes: at dead and saturated units (``extrema``), anywhere (``random``), or where one
        batch's loss gradient is largest (``gradient``).
      grow_until: share of the training by which all events are over, in (0, 1).
      prune: share of the weakest connections that each rewiring replaces, in [0, 1); 0 switches rewiring off.
      rewire: the rule by which connections are moved inside the compiled step: ``set``, ``rigl`` or ``random``, whose
        share falls from ``prune`` to 0 along a cosine, or ``none``. ``None``: between dispatches, put by ``placement``.
      rewire_every: steps between two rewirings.
      rewire_until: share of the training after which nothing is rewired any more, in [0, 1].
      epochs: passes over the training part; ``None``: 30, or as many as make 4,000 steps where that is more.
      patience: epochs without a better validation accuracy, counted after the last growth event, that end the run;
        0 never does.
      seed: seed of everything but the data split.
      batch_size: rows a step.
      learning_rate: peak of the cosine schedule.
      weight_decay: decoupled weight decay (AdamW's), >= 0, times the learning rate.
      warmup: steps over which a new connection's (or leaf's) rate rises from 0.
      strategy: ``none``: one rate everywhere; ``dual``: new parts faster, the scaffold slower.
      on_growth: what the scaffold does for ``warmup`` steps after an event: ``none``, ``slow`` (a tenth), ``freeze``.
      patch_size: rows and columns of one embedded patch.

    Example:
      >>> from optax_structure.training.config import Config
      >>> Config(widths=(64, 32)).total_steps(1294)
      4000
      >>> Config(density=1.5)
      Traceback (most recent call last):
      ValueError: density=1.5 must lie in (0, 1].
    """

    widths: tuple[int, ...] = (64, 32)
    density: float = 0.1
    final_density: float = 0.25
    events: int = 4
    actions: tuple[Action, ...] = ("connections", "patches")
    placement: Placement = "gradient"
    grow_until: float = 0.3
    prune: float = 0.2
    rewire: Rewire | None = None
    rewire_every: int = 150
    rewire_until: float = 0.75
    epochs: int | None = None
    patience: int = 0
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 1e-2
    weight_decay: float = 0.05
    warmup: int = 25
    strategy: Strategy = "dual"
    on_growth: OnGrowth = "none"
    patch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("density", "final_density"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value} must lie in (0, 1].")
        if self.final_density < self.density:
            raise ValueError(
                f"final_density={self.final_density} is below density={self.density}: the budget would be below the "
                "current count. Raise final_density or lower density."
            )
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths} must name at least one hidden layer, each of 1 unit or more.")
        for name, kind, values in (
            ("actions", Action, self.actions or ("",)),
            ("placement", Placement, (self.placement,)),
            ("strategy", Strategy, (self.strategy,)),
            ("on_growth", OnGrowth, (self.on_growth,)),
            ("rewire", Rewire, () if self.rewire is None else (self.rewire,)),
        ):
            for value in values:
                if value not in get_args(kind):
                    raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(get_args(kind))}.")
        for name, least in (
            ("events", 0), ("patience", 0), ("rewire_every", 1), ("batch_size", 1), ("warmup", 0), ("patch_size", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1.")
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune={self.prune} must lie in [0, 1): it is the share of connections to replace.")
        if not 0 < self.grow_until < 1 or not 0 <= self.rewire_until <= 1:
            raise ValueError(
                f"grow_until={self.grow_until} must lie in (0, 1) and rewire_until={self.rewire_until} in [0, 1]."
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate={self.learning_rate} must be a positive number.")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay={self.weight_decay} must be a number of at least 0.")
        if self.events == 0 and self.final_density != self.density:
            raise ValueError(
                f"events=0 cannot take density={self.density} to final_density={self.final_density}: make them equal, "
                "or ask for at least one event."
            )

    def total_steps(self, rows: int) -> int:
        """Training steps of the whole run over ``rows`` training rows.

        Example:
          >>> from optax_structure.training.config import Config
          >>> Config(epochs=3, batch_size=100).total_steps(1000)
          30
        """
        per_epoch = max(1, rows // self.batch_size)
        return self.epochs * per_epoch if self.epochs is not None else max(EPOCHS * per_epoch, MIN_STEPS)

    def event_steps(self, rows: int) -> tuple[int, ...]:
        """The steps after which growth events fall: evenly spread up to ``grow_until`` of the run.

        Example:
          >>> from optax_structure.training.config import Config
          >>> Config(epochs=10, batch_size=100, events=3).event_steps(1000)
          (10, 20, 30)
        """
        total = self.total_steps(rows)
        return tuple(max(1, round(self.grow_until * total * (i + 1) / self.events)) for i in range(self.events))

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, checked again.

        Example:
          >>> from optax_structure.training.config import Config
          >>> Config().replace(seed=4).seed
          4
        """
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """A dict that JSON can hold; ``from_json`` is the inverse.

        Example:
          >>> from optax_structure.training.config import Config
          >>> Config.from_json(Config(seed=3).to_json()) == Config(seed=3)
          True
        """
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Config:
        """The inverse of ``to_json``.

        Example:
          >>> from optax_structure.training.config import Config
          >>> Config.from_json({"widths": [8]}).widths
          (8,)
        """
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
        return cls(**fields)
