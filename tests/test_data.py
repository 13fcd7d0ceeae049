"""Data for the main job: files in, split and standardised arrays out, and errors that name file and fix."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from optax_structure.training.data import Raw, fingerprint, load_data, prepare, read_idx

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array: np.ndarray) -> bytes:
    """The IDX file format, from its description: two zero bytes, type 8, rank, big-endian sizes, row-major data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def raw_set(rows: int = 30, tests: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return (
        rng.integers(0, 256, (rows, 5, 4), dtype=np.uint8),
        (np.arange(rows) % 3).astype(np.uint8),
        rng.integers(0, 256, (tests, 5, 4), dtype=np.uint8),
        (np.arange(tests) % 3).astype(np.uint8),
    )


def write_folder(folder: Path, *, gz: bool = False, dot: bool = False) -> tuple[np.ndarray, ...]:
    arrays = raw_set()
    for name, array in zip(NAMES, arrays, strict=True):
        name = name.replace("-idx", ".idx") if dot else name
        content = idx_bytes(array)
        (folder / (name + ".gz" * gz)).write_bytes(gzip.compress(content) if gz else content)
    return arrays


@pytest.mark.parametrize(("gz", "dot"), [(False, False), (True, False), (False, True)])
def test_idx_folder(tmp_path: Path, gz: bool, dot: bool) -> None:
    arrays = write_folder(tmp_path, gz=gz, dot=dot)
    data = load_data(data_dir=tmp_path, validation=0.2)
    assert data.x_train.shape == (24, 20) and data.x_validation.shape == (6, 20) and data.x_test.shape == (10, 20)
    assert data.x_train.dtype == np.float32 and data.y_train.dtype == np.int32
    assert data.classes == 3 and data.image_shape == (5, 4) and data.name == tmp_path.stem
    pre = data.preprocessing
    np.testing.assert_allclose(data.x_test * pre["std"] + pre["mean"], arrays[2].reshape(10, -1) / 255, atol=1e-6)
    np.testing.assert_array_equal(data.y_test, arrays[3])


def test_split_is_a_partition_and_has_its_own_seed() -> None:
    x = np.arange(40, dtype=np.float32).reshape(40, 1) * np.ones((1, 2), np.float32)
    y = np.arange(40) % 2
    parts = [prepare(Raw(x, y, x, y), "toy", split_seed=seed) for seed in (0, 0, 1)]
    rows = []
    for data in parts:
        back = [
            part[:, 0] * data.preprocessing["std"] + data.preprocessing["mean"]
            for part in (data.x_train, data.x_validation)
        ]
        assert sorted(np.round(np.concatenate(back)).astype(int).tolist()) == list(range(40))
        rows.append(np.round(back[1]).astype(int).tolist())
    assert len(rows[0]) == 4 and rows[0] == rows[1] != rows[2]


def test_standardised_by_the_training_part_alone() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (200, 6))
    y = np.arange(200) % 4
    data = prepare(Raw(x, y, x + 100, y), "toy")
    assert abs(float(data.x_train.mean())) < 1e-5 and abs(float(data.x_train.std()) - 1) < 1e-5
    assert float(data.x_test.mean()) > 10
    assert data.preprocessing["scale"] == 1.0


def test_constant_pixels_do_not_divide_by_zero() -> None:
    x, y = np.zeros((20, 4), np.uint8), np.arange(20) % 2
    assert np.isfinite(prepare(Raw(x, y, x, y), "toy").x_train).all()


def test_npz_file_and_folder(tmp_path: Path) -> None:
    arrays = raw_set()
    np.savez(tmp_path / "set.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True)))
    data = load_data(data_dir=tmp_path / "set.npz")
    again = load_data(data_dir=tmp_path)
    assert data.name == "set" and data.fingerprint == again.fingerprint == fingerprint(Raw(*arrays))


def test_digits_are_the_same_every_time() -> None:
    pytest.importorskip("sklearn")
    one, two = load_data("digits"), load_data("digits")
    assert one.fingerprint == two.fingerprint
    assert len(one.x_train) + len(one.x_validation) + len(one.x_test) == 1797
    assert one.image_shape == (8, 8) and set(one.y_test.tolist()) == set(range(10))


@pytest.mark.slow
def test_openml_is_fetched_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(name: str, **kwargs: object) -> tuple[np.ndarray, np.ndarray]:
        calls.append(name)
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (60010, 784)).astype(np.uint8), np.array([str(i % 10) for i in range(60010)])

    fake = ModuleType("sklearn.datasets")
    fake.fetch_openml = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)
    one = load_data("fashion_mnist", cache_dir=tmp_path)
    two = load_data("fashion_mnist", cache_dir=tmp_path)
    assert calls == ["Fashion-MNIST"] and one.fingerprint == two.fingerprint
    assert one.x_test.shape == (10, 784) and one.image_shape == (28, 28)


def test_no_network_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, **kwargs: object) -> None:
        raise OSError("no route to host")

    fake = ModuleType("sklearn.datasets")
    fake.fetch_openml = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", fake)
    with pytest.raises(OSError, match=r"mnist.*--dataset digits.*--data-dir"):
        load_data("mnist", cache_dir=tmp_path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*four IDX files"):
        load_data(data_dir=tmp_path / "nowhere")
    write_folder(tmp_path)
    (tmp_path / NAMES[3]).unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte"):
        load_data(data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"set\.npz"):
        load_data(data_dir=tmp_path / "set.npz")


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("keep", [0, 3, 10, 15, 100])
def test_truncated_idx(tmp_path: Path, gz: bool, keep: int) -> None:
    path = tmp_path / ("images" + ".gz" * gz)
    content = idx_bytes(raw_set()[0])
    path.write_bytes(gzip.compress(content)[:keep] if gz else content[:keep])
    with pytest.raises(ValueError, match=r"images.* is truncated.*download it again"):
        read_idx(path, 3)


def test_truncated_inside_a_whole_gzip(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(raw_set()[0])[:-1]))
    with pytest.raises(ValueError, match=r"images\.gz is truncated: 599 bytes of data, its header says 600"):
        read_idx(path, 3)


def test_wrong_magic_overlong_and_no_gzip(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(idx_bytes(raw_set()[0]))
    with pytest.raises(ValueError, match="magic number 2051, expected 2049"):
        read_idx(path, 1)
    path.write_bytes(idx_bytes(raw_set()[1]) + b"x")
    with pytest.raises(ValueError, match="too long"):
        read_idx(path, 1)
    (tmp_path / "labels.gz").write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="no gzip file"):
        read_idx(tmp_path / "labels.gz", 1)


def test_bad_npz(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x_train=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"set\.npz lacks \['y_train', 'x_test', 'y_test'\]"):
        load_data(data_dir=path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"set\.npz is truncated"):
        load_data(data_dir=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_train": np.zeros(19, int)}, r"x_train has shape \(20, 3\) and y_train \(19,\)"),
        ({"y_test": np.zeros(20)}, "y_test must hold whole numbers"),
        ({"y_train": np.full(20, -1)}, "y_train must hold whole numbers from 0"),
        ({"x_test": np.zeros((20, 4))}, r"x_train rows are \(3,\).*x_test rows \(4,\)"),
        ({"x_test": np.zeros((20, 3), np.uint8)}, "float64 but x_test rows"),
        ({"x_train": np.full((20, 3), np.nan)}, "x_train holds values that are not finite"),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, np.ndarray], message: str) -> None:
    good = Raw(np.ones((20, 3)), np.zeros(20, int), np.ones((20, 3)), np.zeros(20, int))
    with pytest.raises(ValueError, match=message):
        prepare(good._replace(**change), "toy")


def test_unknown_dataset_and_validation() -> None:
    with pytest.raises(ValueError, match="dataset='cifar' is unknown"):
        load_data("cifar")
    with pytest.raises(ValueError, match="validation=1"):
        load_data("digits", validation=1.0)


def test_real_mnist(mnist_dir: Path) -> None:
    data = load_data(data_dir=mnist_dir)
    assert data.x_train.shape == (54000, 784) and data.x_test.shape == (10000, 784) and data.classes == 10
    assert abs(data.preprocessing["mean"] - 0.1307) < 1e-3 and abs(data.preprocessing["std"] - 0.3081) < 1e-3
