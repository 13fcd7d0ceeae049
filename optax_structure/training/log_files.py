"""Files that a log is written to and read from: JSON lines, CSV, TensorBoard."""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One step: ``"step"`` (int) and name -> number. What was not logged at the step is not in it."""

Sink = Callable[[Sequence[Record]], object]
"""Takes the records of one flush. One that has a ``close`` is closed with the log."""

_BLOCK = 1 << 16


def jsonl_sink(path: str | os.PathLike[str]) -> Sink:
    """A sink that appends one line of JSON a record.

    A line is written whole, or is the last one and is overwritten by what follows: a file is readable whenever the
    process dies, and a run that goes on appends to it. NaN and infinities, which JSON does not have, become ``null``.

    Args:
      path: the file; its folder is there already.

    Returns:
      The sink, for ``RollingLog(sinks=[...])``.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training.logging import jsonl_sink
      >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> jsonl_sink(path)([{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}])
      >>> path.read_text().splitlines()
      ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": null}']
    """
    return functools.partial(_append_jsonl, Path(path))


def _append_jsonl(path: Path, records: Sequence[Record]) -> None:
    _drop_torn_line(path, b'{"step": ')
    valid = ({name: value if math.isfinite(value) else None for name, value in record.items()} for record in records)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in valid)
    with path.open("ab") as file:
        file.write(lines.encode())


def csv_sink(path: str | os.PathLike[str]) -> Sink:
    """A sink that appends one row of comma-separated values a record, under a header.

    The first records say the columns. Where later ones bring others (a label that growth brought), the file is written
    anew, whole or not at all, with the new columns on the right and nothing in them above. NaN is ``nan``.

    Args:
      path: the file; its folder is there already. One that exists is continued under its own header.

    Returns:
      The sink, for ``RollingLog(sinks=[...])``.

    Raises:
      ValueError: when it is called, for a file whose first column is not ``step``.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training.logging import csv_sink
      >>> path = Path(tempfile.mkdtemp()) / "log.csv"
      >>> sink = csv_sink(path)
      >>> sink([{"step": 1, "loss": 0.5}])
      >>> sink([{"step": 2, "loss": 0.25, "lr": 0.1}])
      >>> path.read_text().splitlines()
      ['step,loss,lr', '1,0.5,', '2,0.25,0.1']
    """
    return functools.partial(_append_csv, Path(path))


def _append_csv(path: Path, records: Sequence[Record]) -> None:
    header: list[str] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            line = file.readline()
        header = next(csv.reader([line])) if line.endswith("\n") else []
    if header and header[0] != "step":
        raise ValueError(f"path={str(path)!r} is no log: its first column is {header[0]!r}, not 'step'.")
    _drop_torn_line(path, b"")
    columns = list(dict.fromkeys([*header, *(name for record in records for name in record)]))
    if not header or columns == header:
        with path.open("ab") as file:
            file.write(_csv_rows(columns, records, with_header=not header))
        return
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(_csv_rows(columns, [*read_csv(path), *records], with_header=True))
    os.replace(partial, path)


def _csv_rows(columns: list[str], records: Sequence[Record], *, with_header: bool) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if with_header:
        writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def _drop_torn_line(path: Path, begins: bytes) -> None:
    """Cut off what follows the last newline: the record in whose middle a process died.

    Raises:
      ValueError: where that is no beginning of such a record; then the file is something else.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        tail = b""  # its beginning at least
        newline = -1
        while end and newline < 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            block = file.read(end - start)
            newline = block.rfind(b"\n")
            tail, end = block[newline + 1 :], start + newline + 1
        expected = begins if end or begins else b"step,"  # the header of a CSV file can be torn too
        if tail[: len(expected)] != expected[: len(tail)]:
            raise ValueError(f"path={str(path)!r} is no log: it ends in {tail[:40]!r}. Give the path of a new file.")
        if end < size:
            file.truncate(end)


def tensorboard_sink(folder: str | os.PathLike[str] | Any) -> Sink:
    """A sink that writes every value as a scalar of TensorBoard: ``tensorboard --logdir folder`` shows it.

    The event file follows within seconds, from a thread of tensorboardX; a process that is killed loses those.

    Args:
      folder: of the event file; or a writer that is open already, anything with ``add_scalar(name, value, step)``.

    Returns:
      The sink, for ``RollingLog(sinks=[...])``, with which it is closed; a writer that was given stays open.

    Raises:
      ImportError: when tensorboardX is not installed and no writer is given.

    Example:
      >>> import tempfile
      >>> from optax_structure.training.logging import RollingLog, tensorboard_sink
      >>> class Printed:
      ...     def add_scalar(self, name, value, step):
      ...         print(step, name, value)
      >>> with RollingLog(sinks=[tensorboard_sink(Printed())]) as log:
      ...     log.append(3, {"w_lr/trend": 0.5})
      3 w_lr/trend 0.5
    """
    return _TensorBoard(folder)


class _TensorBoard:
    def __init__(self, folder: Any):
        self._ours = not hasattr(folder, "add_scalar")
        self._writer = folder
        if self._ours:
            try:
                from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                needs = 'tensorboard_sink needs tensorboardX: pip install "optax-structure[tensorboard]"'
                raise ImportError(needs) from error
            self._writer = SummaryWriter(os.fspath(folder), flush_secs=5)

    def __call__(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, record["step"])
        getattr(self._writer, "flush", lambda: None)()

    def close(self) -> None:
        if self._ours:
            self._writer.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file that ``jsonl_sink`` wrote, or is writing; ``null`` is NaN.

    A last line without its end is left out. A run that was set back to a checkpoint has written some steps twice; the
    records stand in the order in which they were written.

    Args:
      path: the file.

    Returns:
      Records.

    Raises:
      ValueError: for a line that is no record, with its number.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training.logging import read_jsonl
      >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
      >>> _ = path.write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "lo')
      >>> read_jsonl(path)
      [{'step': 1, 'loss': 0.5}]
    """
    records = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"path={str(path)!r}, line {number}: {line[:60]!r} is no record of a log.") from error
    return [{name: math.nan if v is None else v for name, v in record.items()} for record in records]


def read_csv(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file that ``csv_sink`` wrote, or is writing; empty fields are left out.

    Args:
      path: the file.

    Returns:
      Records, all values but the step as floats.

    Raises:
      ValueError: for a row that is no record, with its number.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training.logging import read_csv
      >>> path = Path(tempfile.mkdtemp()) / "log.csv"
      >>> _ = path.write_text("step,loss,lr\\n1,0.5,\\n2,0.25,0.1\\n3,0.")
      >>> read_csv(path)
      [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 0.25, 'lr': 0.1}]
    """
    records = []
    for number, row in enumerate(csv.DictReader(_whole_lines(path)), start=2):
        try:
            values = {name: float(value) for name, value in row.items() if name != "step" and value != ""}
            records.append({"step": int(row["step"]), **values})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"path={str(path)!r}, line {number}: {row} is no record of a log.") from error
    return records


def _whole_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file, without a last one that has no end yet."""
    return [line.decode() for line in Path(path).read_bytes().split(b"\n")[:-1]]
