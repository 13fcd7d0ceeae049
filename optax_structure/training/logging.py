"""A rolling log of scalars that training hands out, passed on to files: JSON lines, CSV, TensorBoard.

The numbers stay on the device until many of them are fetched at once, so that logging a step does not wait for it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structure._tree import is_traced
from optax_structure.training.log_files import Record as Record
from optax_structure.training.log_files import Sink as Sink
from optax_structure.training.log_files import csv_sink as csv_sink
from optax_structure.training.log_files import jsonl_sink as jsonl_sink
from optax_structure.training.log_files import read_csv as read_csv
from optax_structure.training.log_files import read_jsonl as read_jsonl
from optax_structure.training.log_files import tensorboard_sink as tensorboard_sink


class RollingLog:
    """The last records of a run, fetched from the device many at a time and passed on to files.

    ``append`` keeps the arrays that it is given and waits for nothing. After ``pull_every`` records, and when the log
    is read or closed, they are fetched with one ``jax.device_get`` and handed to every sink. A process that is killed
    loses the records since then, and none before. (Values must be arrays of their own: what is part of a state that
    the next step donates is gone by the time of the fetch. ``snapshot`` returns copies.)

    Args:
      maxlen: records kept in memory, >= 1; ``None`` keeps all. Sinks get every record.
      pull_every: records between two fetches, >= 1.
      sinks: where records go: ``jsonl_sink``, ``csv_sink``, ``tensorboard_sink``, or any function of a list of records.

    Raises:
      ValueError: for numbers below 1.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from optax_structure.training.logging import RollingLog, jsonl_sink, read_jsonl
      >>> path = tempfile.mkdtemp() + "/log.jsonl"
      >>> with RollingLog(sinks=[jsonl_sink(path)]) as log:
      ...     log.append(0, {"loss": jnp.float32(2.0)})
      ...     log.append(1, {"loss": jnp.array([1.5, 1.25])})  # steps 1 and 2, from one lax.scan
      >>> log.column("step").tolist(), log.column("loss").tolist()
      ([0, 1, 2], [2.0, 1.5, 1.25])
      >>> read_jsonl(path)[-1]
      {'step': 2, 'loss': 1.25}
    """

    def __init__(self, maxlen: int | None = 1000, *, pull_every: int = 100, sinks: Iterable[Sink] = ()):
        for name, number in (("maxlen", maxlen), ("pull_every", pull_every)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number!r} must be an int >= 1.")
        self.pull_every = pull_every
        self.sinks = tuple(sinks)
        self._records: deque[Record] = deque(maxlen=maxlen)
        self._pending: list[tuple[Any, dict[str, Any]]] = []
        self._waiting = 0

    def append(self, step: Any, values: Mapping[str, Any]) -> None:
        """Take the scalars of one step, or those that ``lax.scan`` stacked over several.

        Args:
          step: int, its number. Of stacked values, the first one's (the others count on from it) or an ``(n,)`` array.
          values: name -> scalar or ``(n,)`` array; beside stacked values a scalar is every step's. What ``snapshot``
            returned, and what else belongs to the step: ``{**snapshot(state), "loss": loss}``.

        Raises:
          ValueError: inside a jitted function; for a value that is no number or stacked otherwise than the others; for
            the name ``step``.
        """
        shapes = {name: _shape(name, value) for name, value in {"step": step, **values}.items()}
        if "step" in values:
            raise ValueError("values: 'step' is the name of the step itself; call this value otherwise.")
        stacked = {name: shape[0] for name, shape in shapes.items() if shape}
        if len(set(stacked.values())) > 1:
            raise ValueError(f"values: stacked over different numbers of steps: {stacked}; append them apart.")
        self._pending.append((step, dict(values)))
        self._waiting += next(iter(stacked.values()), 1)
        if self._waiting >= self.pull_every:
            self.flush()

    def flush(self) -> None:
        """Fetch what is on the device, all at once, and hand it to the sinks."""
        pending, self._pending, self._waiting = self._pending, [], 0
        if not pending:
            return
        # As lists: a dict would come back with its names sorted.
        pulled = jax.device_get([[step, *values.values()] for step, values in pending])
        records = [
            record for (_, values), row in zip(pending, pulled, strict=True) for record in _rows(list(values), *row)
        ]
        self._records.extend(records)
        for sink in self.sinks:
            sink(records)

    @property
    def records(self) -> list[Record]:
        """The records in memory, the oldest first."""
        self.flush()
        return list(self._records)

    @property
    def names(self) -> list[str]:
        """The columns of the records in memory, ``"step"`` first."""
        return list(dict.fromkeys(name for record in self.records for name in record)) or ["step"]

    def column(self, name: str) -> np.ndarray:
        """One value over all records in memory: float64, NaN where it was not logged; ``"step"`` is int64.

        Raises:
          ValueError: for a name that was never logged, with those that were.
        """
        records = self.records
        if name == "step":
            return np.array([record["step"] for record in records], np.int64)
        if not any(name in record for record in records):
            raise ValueError(f"name={name!r} is in no record; there are {self.names}.")
        return np.array([record.get(name, math.nan) for record in records], np.float64)

    def close(self) -> None:
        """Flush, and close the sinks that can be closed."""
        try:
            self.flush()
        finally:
            for sink in self.sinks:
                getattr(sink, "close", lambda: None)()

    def __enter__(self) -> RollingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if is_traced(value):
        raise ValueError(f"values: {name!r} is traced: return it from the jitted function and append it outside.")
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    kinds = (jnp.integer,) if name == "step" else (jnp.floating, jnp.integer, np.bool_)
    if array.ndim > 1 or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        wanted = "an int" if name == "step" else "a real number"
        found = f"shape {array.shape} and dtype {array.dtype}"
        raise ValueError(f"values: {name!r} has {found}; it must be {wanted}, or an (n,) array of such for n steps.")
    return array.shape


def _rows(names: list[str], step: Any, *values: Any) -> list[Record]:
    """The records of one ``append``: one, or one for each stacked step."""
    step, arrays = np.asarray(step), [np.asarray(value) for value in values]
    size = next((array.size for array in (step, *arrays) if array.ndim), 1)
    steps = step if step.ndim else step + np.arange(size)
    columns = [np.broadcast_to(array, size) for array in arrays]
    return [
        {"step": int(now), **dict(zip(names, map(_number, row), strict=True))}
        for now, *row in zip(steps, *columns, strict=True)
    ]


def _number(value: Any) -> int | float:
    if value.dtype.kind in "biu":
        return int(value)
    # The shortest text that reads back as the same float32: 0.1 and not 0.10000000149011612.
    return float(str(value)) if value.dtype == np.float32 else float(value)
