"""``training.load_params``: PyTorch's layouts turned, Orbax taken as it is, and every name accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_equal
from flax import linen, nnx

from optax_structure import nn
from optax_structure._tree import PyTree, leaves_by_path
from optax_structure.training import load_params

RNG = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def save_torch(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    numpy = pytest.importorskip("safetensors.numpy")
    # The library writes the buffer as it lies in memory: a transposed view would be stored untransposed.
    numpy.save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, str(path))
    return path


def save_orbax(path: Path, tree: PyTree) -> Path:
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


class Net(nnx.Module):
    """Convolution, norm, embedding and two linear layers, one of them square."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 3, (3, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.square = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)


def torch_state() -> dict[str, np.ndarray]:
    """What PyTorch's ``state_dict`` of that network holds."""
    return {
        "conv.weight": drawn(3, 2, 3, 2),
        "conv.bias": drawn(3),
        "norm.weight": drawn(3),
        "norm.bias": drawn(3),
        "norm.running_mean": drawn(3),
        "norm.running_var": drawn(3),
        "norm.num_batches_tracked": np.asarray([7]),
        "embed.weight": drawn(5, 4),
        "square.weight": drawn(4, 4),
        "square.bias": drawn(4),
        "head.weight": drawn(3, 4),
        "head.bias": drawn(3),
    }


def test_pytorch_layouts_are_turned(tmp_path: Path) -> None:
    state = torch_state()
    model = Net(nnx.Rngs(0))
    loaded = load_params(save_torch(tmp_path / "net.safetensors", state), nnx.state(model, (nnx.Param, nnx.BatchStat)))
    assert loaded.missing == [] and loaded.unexpected == ["norm.num_batches_tracked"] and len(loaded.matched) == 11
    nnx.update(model, loaded.params)
    # A linear layer of PyTorch is x @ W.T + b; a square one is turned like any other.
    x = drawn(2, 4)
    np.testing.assert_allclose(
        model.square(x), x @ state["square.weight"].T + state["square.bias"], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(model.embed(jnp.asarray([3])), state["embed.weight"][[3]])
    np.testing.assert_array_equal(model.norm.scale[...], state["norm.weight"])
    np.testing.assert_array_equal(model.norm.var[...], state["norm.running_var"])
    # A convolution at one place, by PyTorch's definition: sum over in, kh, kw of weight[out, in, kh, kw] * patch.
    image = drawn(1, 3, 2, 2)
    full = np.einsum("oihw,hwi->o", state["conv.weight"], image[0]) + state["conv.bias"]
    # 'SAME' pads a 3 x 2 window by (1, 1) and (0, 1), so the output at (1, 0) sees the image and nothing else.
    np.testing.assert_allclose(model.conv(image)[0, 1, 0], full, rtol=1e-4, atol=1e-5)


def test_one_dimensional_convolutions_and_dtypes(tmp_path: Path) -> None:
    weight = drawn(5, 2, 3)
    path = save_torch(tmp_path / "conv.safetensors", {"conv.weight": weight})
    params = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 2, 5), jnp.bfloat16)}}
    kernel = load_params(path, params).params["conv"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, jnp.asarray(weight.transpose(2, 1, 0), jnp.bfloat16))


def test_a_kernel_in_a_safetensors_file_is_flax_already(tmp_path: Path) -> None:
    kernel = drawn(4, 4)
    path = save_torch(tmp_path / "flax.safetensors", {"square.kernel": kernel})
    loaded = load_params(path, {"square": {"kernel": jnp.zeros((4, 4)), "bias": jnp.ones(4)}})
    np.testing.assert_array_equal(loaded.params["square"]["kernel"], kernel)
    assert loaded.missing == ["square/bias"]
    np.testing.assert_array_equal(loaded.params["square"]["bias"], 1.0)


@pytest.mark.parametrize(
    "rename",
    [
        {r"^model/": "", r"layers/(\d+)/": r"hidden_\1/", r"^classifier/": "head/"},
        lambda name: name.removeprefix("model/").replace("layers/1", "hidden_1").replace("classifier", "head"),
    ],
    ids=["regexes", "function"],
)
def test_names_are_brought_together(tmp_path: Path, rename: Any) -> None:
    tensors = {"model.layers.1.weight": drawn(3, 2), "model.classifier.weight": drawn(1, 3), "model.pos": drawn(9)}
    path = save_torch(tmp_path / "model.safetensors", tensors)
    params = {"hidden_1": {"kernel": jnp.zeros((2, 3))}, "head": {"kernel": jnp.zeros((3, 1))}}
    loaded = load_params(path, params, rename=rename)
    assert loaded.matched == ["head/kernel", "hidden_1/kernel"] and loaded.unexpected == ["model.pos"]
    np.testing.assert_array_equal(loaded.params["hidden_1"]["kernel"], tensors["model.layers.1.weight"].T)


def test_a_function_may_say_that_a_name_is_no_parameter(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "net.safetensors", {"body.weight": drawn(3, 2), "head.weight": drawn(9, 3)})
    params = {"body": {"kernel": jnp.zeros((2, 3))}, "head": {"kernel": jnp.ones((3, 1))}}
    loaded = load_params(path, params, rename=lambda name: None if name.startswith("head") else name)
    assert loaded.matched == ["body/kernel"] and loaded.unexpected == ["head.weight"]
    assert loaded.missing == ["head/kernel"]
    with pytest.raises(ValueError, match="matches no parameter"):
        load_params(path, params, rename=lambda name: None)


def test_the_documented_cure_of_a_linear_behind_a_flattened_convolution(tmp_path: Path) -> None:
    C, H, W = 2, 3, 4
    weight, features = drawn(5, C * H * W), drawn(6, C, H, W)
    path = save_torch(tmp_path / "net.safetensors", {"fc.weight": weight})
    kernel = load_params(path, {"fc": {"kernel": jnp.zeros((H * W * C, 5))}}).params["fc"]["kernel"]
    cure = [line.strip() for line in (load_params.__doc__ or "").splitlines() if line.strip().startswith("kernel = ")]
    assert len(cure) == 2
    names = {"kernel": np.asarray(kernel), "C": C, "H": H, "W": W}
    exec("\n".join(cure), names)
    # PyTorch flattens (C, H, W), Flax (H, W, C).
    ours = np.transpose(features, (0, 2, 3, 1)).reshape(6, -1) @ names["kernel"]
    np.testing.assert_allclose(ours, features.reshape(6, -1) @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("nnx", marks=pytest.mark.slow), "linen", "dict"])
def test_orbax_round_trip(tmp_path: Path, kind: str) -> None:
    if kind == "nnx":
        saved: Any = nnx.state(nn.MLP([4, 4, 2], rngs=nnx.Rngs(0)), nnx.Param)
        like: Any = nnx.state(nn.MLP([4, 4, 2], rngs=nnx.Rngs(1)), nnx.Param)
    elif kind == "linen":
        x = jnp.ones((1, 4))
        saved, like = (jax.jit(linen.Dense(4).init)(jax.random.key(seed), x)["params"] for seed in (0, 1))
    else:
        saved = {"a": [jnp.ones(2), jnp.full((2, 2), 2.0, jnp.bfloat16)], "n": jnp.arange(3)}
        like = jax.tree.map(jnp.zeros_like, saved)
    loaded = load_params(save_orbax(tmp_path / "saved", saved), like)
    assert_equal(loaded.params, saved)
    assert loaded.matched == list(leaves_by_path(saved)) and not loaded.missing and not loaded.unexpected


def test_a_backbone_from_one_model_goes_into_another(tmp_path: Path) -> None:
    saved = nnx.state(nn.MLP([6, 5, 3], rngs=nnx.Rngs(0)), nnx.Param)
    like = nnx.state(nn.MLP([6, 5, 4, 3], rngs=nnx.Rngs(1)), nnx.Param)
    loaded = load_params(save_orbax(tmp_path / "saved", saved), like, rename={"^head/": "old_head/"})
    assert loaded.matched == ["hidden_1/bias", "hidden_1/kernel"]
    assert loaded.missing == ["head/bias", "head/kernel", "hidden_2/bias", "hidden_2/kernel"]
    assert sorted(loaded.unexpected) == ["head/bias/value", "head/kernel/value"]
    assert_equal(loaded.params["hidden_1"], saved["hidden_1"])
    assert_equal(loaded.params["head"], like["head"])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = save_torch(tmp_path / "net.safetensors", {"head.weight": drawn(3, 4), "head.bias": drawn(3)})
    with pytest.raises(ValueError, match=r"'head\.weight' has shape \(4, 3\) in Flax's layout.*'head/kernel' \(3, 4\)"):
        load_params(path, {"head": {"kernel": jnp.zeros((3, 4))}})
    with pytest.raises(ValueError, match=r"matches no parameter: it holds \['head\.bias', 'head\.weight'\].*\['w'\]"):
        load_params(path, {"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"rename brings both 'head\.\w+' and 'head\.\w+' to 'w'"):
        load_params(path, {"w": jnp.zeros(3)}, rename={"^.+$": "w"})
    with pytest.raises(ValueError, match=r"rename: '\(' -> '' is no valid regex"):
        load_params(path, {"w": jnp.zeros(3)}, rename={"(": ""})


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors' does not exist"):
        load_params(tmp_path / "nowhere.safetensors", {})
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"cos\nsystem\n.")
    with pytest.raises(ValueError, match=r"model\.pt' is neither.*pickle.*safetensors\.torch\.save_file"):
        load_params(pickled, {})


def test_a_folder_that_is_no_checkpoint_names_those_inside(tmp_path: Path) -> None:
    save_orbax(tmp_path / "step" / "default", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"is no Orbax checkpoint of a tree, but holds \['default'\]"):
        load_params(tmp_path / "step", {"w": jnp.ones(2)})


def test_missing_safetensors_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install safetensors"):
        load_params(tmp_path / "x.safetensors", {"w": jnp.ones(2)})
