"""Data for the main job: named sets, IDX folders and ``.npz`` files, split, standardised and fingerprinted.

The validation part is cut from the training set with a seed of its own, so that every run, control and resumed run
sees the same split. What was done to the pixels is kept beside them: a checkpoint stores it.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Dataset = Literal["digits", "mnist", "fashion_mnist"]
DATASETS: tuple[str, ...] = ("digits", "mnist", "fashion_mnist")

_OPENML = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
_IDX_PARTS = (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1))
_NPZ_PARTS = ("x_train", "y_train", "x_test", "y_test")


class Data(NamedTuple):
    """A data set ready for training: standardised float32 rows and int32 labels.

    Attributes:
      name: what it is called in the report.
      x_train: ``(n, inputs)`` float32, and ``y_train``: ``(n,)`` int32 in ``[0, classes)``.
      x_validation: the part of the training set that drives every decision, with ``y_validation``.
      x_test: read once, at the end of a run, with ``y_test``.
      classes: number of classes.
      image_shape: ``(height, width)`` of one row where it is an image, else ``()``.
      preprocessing: ``{"scale", "mean", "std", "split_seed", "validation"}``: a raw value ``r`` became
        ``(r * scale - mean) / std``.
      fingerprint: sha256 of the raw arrays.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int
    image_shape: tuple[int, ...]
    preprocessing: dict[str, float]
    fingerprint: str


class Raw(NamedTuple):
    """The four arrays as they were stored: images ``(n, ...)`` and labels ``(n,)``."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_data(
    dataset: str = "digits",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    validation: float = 0.1,
    split_seed: int = 0,
) -> Data:
    """Load, split and standardise a data set.

    One mean and one standard deviation, of all pixels of the training part, standardise everything.

    Args:
      dataset: ``"digits"`` (scikit-learn's, no network), ``"mnist"`` or ``"fashion_mnist"`` (OpenML, cached).
        Ignored where ``data_dir`` is given.
      data_dir: a folder with the four IDX files in the MNIST naming, gzipped or not, or with one ``.npz`` file
        holding ``x_train, y_train, x_test, y_test``, or the ``.npz`` file itself.
      cache_dir: where downloads are kept; ``~/.cache/optax_structure`` without it.
      validation: share of the training set that becomes the validation part, in (0, 1).
      split_seed: seed of that split.

    Returns:
      ``Data``.

    Raises:
      FileNotFoundError: for a missing folder or file, naming it.
      ValueError: for an unknown data set, a truncated or malformed file, arrays that do not fit each other.

    Example:
      >>> from optax_structure.training.data import load_data
      >>> data = load_data("digits")
      >>> data.x_train.shape, data.x_validation.shape, data.x_test.shape, data.classes
      ((1294, 64), (144, 64), (359, 64), 10)
    """
    if not 0 < validation < 1:
        raise ValueError(
            f"validation={validation} must lie in (0, 1): it is the share of the training set to hold out."
        )
    if data_dir is not None:
        path = Path(data_dir)
        raw, name = _read_folder(path), path.resolve().stem
    elif dataset == "digits":
        raw, name = _digits(), dataset
    elif dataset in _OPENML:
        raw, name = _openml(dataset, Path(cache_dir or Path.home() / ".cache" / "optax_structure")), dataset
    else:
        raise ValueError(
            f"dataset={dataset!r} is unknown; use one of {list(DATASETS)}, or data_dir= for your own files."
        )
    return prepare(raw, name, validation=validation, split_seed=split_seed)


def prepare(raw: Raw, name: str, *, validation: float = 0.1, split_seed: int = 0) -> Data:
    """Split, scale and standardise raw arrays; integer pixels are divided by 255 first.

    Args:
      raw: the four arrays; labels are whole numbers from 0.
      name: what the report calls the set.
      validation: share of the training set that is held out.
      split_seed: seed of that split.

    Returns:
      ``Data``.

    Raises:
      ValueError: for arrays of different lengths or labels that are not whole numbers from 0.

    Example:
      >>> import numpy as np
      >>> from optax_structure.training.data import Raw, prepare
      >>> x, y = np.arange(40, dtype=np.uint8).reshape(20, 2), np.arange(20) % 2
      >>> data = prepare(Raw(x, y, x, y), "toy")
      >>> data.x_train.shape, bool(abs(data.x_train.mean()) < 1e-6)
      ((18, 2), True)
    """
    _check(raw, name)
    scale = 1 / 255 if np.issubdtype(raw.x_train.dtype, np.integer) else 1.0
    order = np.random.default_rng(split_seed).permutation(len(raw.x_train))
    held = max(1, round(validation * len(order)))
    # Sorted, so that a part keeps the order of the file and only the choice of rows is random.
    train, kept = np.sort(order[held:]), np.sort(order[:held])
    rows = raw.x_train.reshape(len(raw.x_train), -1).astype(np.float32) * np.float32(scale)
    mean, std = np.float32(rows[train].mean(dtype=np.float64)), np.float32(rows[train].std(dtype=np.float64))
    std = std if std > 0 else np.float32(1)
    test = raw.x_test.reshape(len(raw.x_test), -1).astype(np.float32) * np.float32(scale)
    labels = raw.y_train.astype(np.int32)
    return Data(
        name=name,
        x_train=(rows[train] - mean) / std,
        y_train=labels[train],
        x_validation=(rows[kept] - mean) / std,
        y_validation=labels[kept],
        x_test=(test - mean) / std,
        y_test=raw.y_test.astype(np.int32),
        classes=int(max(raw.y_train.max(), raw.y_test.max())) + 1,
        image_shape=_image_shape(raw.x_train.shape[1:]),
        preprocessing={
            "scale": float(scale),
            "mean": float(mean),
            "std": float(std),
            "split_seed": split_seed,
            "validation": validation,
        },
        fingerprint=fingerprint(raw),
    )


def fingerprint(raw: Raw) -> str:
    """sha256 over shapes, dtypes and bytes of the four arrays.

    Example:
      >>> import numpy as np
      >>> from optax_structure.training.data import Raw, fingerprint
      >>> x, y = np.zeros((2, 3)), np.zeros(2, int)
      >>> fingerprint(Raw(x, y, x, y)) == fingerprint(Raw(x, y, x + 1, y))
      False
    """
    digest = hashlib.sha256()
    for array in raw:
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) >= 2:
        return tuple(shape[:2]) if len(shape) == 2 or shape[2] == 1 else ()
    side = round(shape[0] ** 0.5) if shape else 0
    return (side, side) if shape and side * side == shape[0] and side > 3 else ()


def _check(raw: Raw, name: str) -> None:
    for part, x, y in (("train", raw.x_train, raw.y_train), ("test", raw.x_test, raw.y_test)):
        if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or not len(x):
            raise ValueError(
                f"{name}: x_{part} has shape {x.shape} and y_{part} {y.shape}; expected (n, ...) and (n,) with n > 0."
            )
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise ValueError(f"{name}: y_{part} must hold whole numbers from 0, but it is {y.dtype} from {y.min()}.")
        if not np.isfinite(x).all():
            raise ValueError(f"{name}: x_{part} holds values that are not finite; clean the file first.")
    train, test = raw.x_train, raw.x_test
    if train.shape[1:] != test.shape[1:] or train.dtype.kind != test.dtype.kind:
        raise ValueError(
            f"{name}: x_train rows are {train.shape[1:]} {train.dtype} but x_test rows {test.shape[1:]} {test.dtype}."
        )


def _digits() -> Raw:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch: Any = load_digits()
    # Its pixels are 0..16. A fixed shuffle: the file has no test part of its own.
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images, labels = (bunch.images / 16).astype(np.float32)[order], bunch.target.astype(np.int32)[order]
    cut = round(0.8 * len(order))
    return Raw(images[:cut], labels[:cut], images[cut:], labels[cut:])


def _openml(dataset: str, cache: Path) -> Raw:
    """70,000 images in the order of the original files, kept as one ``.npz`` after the first download."""
    stored = cache / f"{dataset}.npz"
    if not stored.exists():
        from sklearn.datasets import fetch_openml

        cache.mkdir(parents=True, exist_ok=True)
        try:
            x, y = fetch_openml(
                _OPENML[dataset], version=1, data_home=str(cache), return_X_y=True, as_frame=False, parser="liac-arff"
            )
        except OSError as error:
            raise OSError(
                f"dataset={dataset!r} could not be downloaded from OpenML ({error}). Use --dataset digits, which needs "
                "no network, or --data-dir with the four IDX files."
            ) from error
        x, y = np.asarray(x).astype(np.uint8).reshape(-1, 28, 28), np.asarray(y).astype(np.int32)
        partial = stored.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez_compressed(partial, x_train=x[:60000], y_train=y[:60000], x_test=x[60000:], y_test=y[60000:])
        os.replace(partial, stored)
    return _read_npz(stored)


def _read_folder(path: Path) -> Raw:
    if path.suffix == ".npz":
        return _read_npz(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"data_dir={str(path)!r} is not a folder; it must hold the four IDX files in the MNIST naming "
            "(train-images-idx3-ubyte.gz, ...) or one .npz file."
        )
    npz = sorted(path.glob("*.npz"))
    if len(npz) == 1 and not any(path.glob("train-images*")):
        return _read_npz(npz[0])
    return Raw(*(read_idx(_find_idx(path, part, rank), rank) for part, rank in _IDX_PARTS))


def _find_idx(folder: Path, part: str, rank: int) -> Path:
    names = [f"{part}{dash}idx{rank}-ubyte{end}" for end in ("", ".gz") for dash in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"data_dir={str(folder)!r} has no {names[0]} (nor {names[2]}); put the file there.")


def read_idx(path: str | os.PathLike[str], rank: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzipped when its name ends in ``.gz``.

    Args:
      path: the file.
      rank: how many axes it must have: 3 for images, 1 for labels.

    Returns:
      A uint8 array.

    Raises:
      FileNotFoundError: where there is no such file.
      ValueError: for another magic number, a truncated or an overlong file, naming it.

    Example:
      >>> import tempfile, pathlib
      >>> from optax_structure.training.data import read_idx
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "labels"
      >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
      >>> read_idx(path, 1).tolist()
      [7, 8, 9]
    """
    path = Path(path)
    again = "download it again"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or no gzip file ({error}); {again}.") from error
    header = 4 * (1 + rank)
    if len(content) < header:
        raise ValueError(f"{path} is truncated: {len(content)} bytes, but its header alone takes {header}; {again}.")
    magic, *shape = np.frombuffer(content[:header], ">u4").tolist()
    if magic != 0x0800 + rank:
        raise ValueError(
            f"{path} starts with magic number {magic}, expected {0x0800 + rank} (unsigned bytes, {rank} axes): it is "
            f"another kind of file; {again}."
        )
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - header != expected:
        kind = "truncated" if len(content) - header < expected else "too long"
        raise ValueError(
            f"{path} is {kind}: {len(content) - header} bytes of data, its header says {expected}; {again}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_npz(path: Path) -> Raw:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        # Opened here: NumPy leaves its own handle open when the archive is broken.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            missing = [name for name in _NPZ_PARTS if name not in arrays]
            if missing:
                raise ValueError(f"{path} lacks {missing}; it must hold {list(_NPZ_PARTS)}.")
            return Raw(*(arrays[name] for name in _NPZ_PARTS))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path} is truncated or no .npz file ({error}); write it again with numpy.savez.") from error
