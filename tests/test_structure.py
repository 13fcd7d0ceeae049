"""Unit groups: which axes of which leaves are the same unit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from optax_structure.structure import (
    INPUT,
    Link,
    UnitAxis,
    conv_chain,
    dense_chain,
    identity_sources,
    kernel_links,
)


def dense(rows: int, columns: int, bias: bool = True) -> dict[str, jnp.ndarray]:
    kernel = {"kernel": jnp.ones((rows, columns))}
    return kernel | ({"bias": jnp.zeros(columns)} if bias else {})


def conv_params() -> dict[str, dict[str, jnp.ndarray]]:
    return {
        "conv_1": {"kernel": jnp.ones((3, 3, 1, 4)), "bias": jnp.zeros(4)},
        "bn": {"scale": jnp.ones(4), "bias": jnp.zeros(4), "mean": jnp.zeros(4), "var": jnp.ones(4)},
        "conv_2": {"kernel": jnp.ones((5, 5, 4, 6))},
        "hidden": dense(6 * 9, 8),
        "head": dense(8, 2),
    }


def test_dense_chain_names_every_axis_of_every_unit() -> None:
    units = dense_chain({"a": dense(5, 4), "b": dense(4, 3, bias=False), "c": dense(3, 2)}, ["a", "b", "c"])
    assert units.layers == ("a", "b", "c")
    assert [group.size for group in units.groups] == [5, 4, 3, 2]
    assert units.group(INPUT).axes == (UnitAxis("a/kernel", 0, "outgoing"),)
    assert units.group("a").axes == (
        UnitAxis("a/kernel", 1, "incoming"),
        UnitAxis("a/bias", 0, "bias"),
        UnitAxis("b/kernel", 0, "outgoing"),
    )
    assert units.group("b").axes == (UnitAxis("b/kernel", 1, "incoming"), UnitAxis("c/kernel", 0, "outgoing"))
    assert units.group("c").axes == (UnitAxis("c/kernel", 1, "incoming"), UnitAxis("c/bias", 0, "bias"))
    assert hash(units) == hash(
        dense_chain({"a": dense(5, 4), "b": dense(4, 3, bias=False), "c": dense(3, 2)}, list("abc"))
    )


def test_convolutions_flatten_and_normalisation() -> None:
    units = dense_chain(conv_params(), ["conv_1", "conv_2", "hidden", "head"], norms={"conv_1": "bn"})
    assert [group.size for group in units.groups] == [1, 4, 6, 8, 2]
    assert units.group("conv_1").axes == (
        UnitAxis("conv_1/kernel", 3, "incoming"),
        UnitAxis("conv_1/bias", 0, "bias"),
        UnitAxis("bn/scale", 0, "scale"),
        UnitAxis("bn/bias", 0, "bias"),
        UnitAxis("bn/mean", 0, "bias"),
        UnitAxis("bn/var", 0, "scale"),
        UnitAxis("conv_2/kernel", 2, "outgoing"),
    )
    assert units.group("conv_2").axes[-1] == UnitAxis("hidden/kernel", 0, "outgoing", 9)
    assert kernel_links(units)[2] == Link("hidden/kernel", "conv_2", "hidden", 0, 1, 9)


def test_flatten_order_is_position_then_channel() -> None:
    # Row r * channels + unit of the dense kernel reads the unit at position r: what NHWC .reshape(batch, -1) gives.
    maps = np.arange(2 * 3 * 3 * 6).reshape(2, 3, 3, 6)
    (axis,) = (a for a in dense_chain(conv_params(), ["conv_2", "hidden"]).group("conv_2").axes if a.role == "outgoing")
    flat = maps.reshape(2, -1)
    for unit in (0, 5):
        rows = [r * 6 + unit for r in range(axis.repeats)]
        np.testing.assert_array_equal(flat[:, rows], maps[..., unit].reshape(2, -1))


def test_conv_chain_states_the_positions() -> None:
    params = conv_params()
    units = conv_chain(params, ["conv_1", "conv_2"], ["hidden", "head"], positions=9, norms={"conv_1": "bn"})
    assert units == dense_chain(params, ["conv_1", "conv_2", "hidden", "head"], norms={"conv_1": "bn"})
    with pytest.raises(ValueError, match=r"positions=4.*54.*9 times the 6 channels of 'conv_2'"):
        conv_chain(params, ["conv_1", "conv_2"], ["hidden", "head"], positions=4)
    with pytest.raises(ValueError, match="'hidden' has a kernel of 2 axes"):
        conv_chain(params, ["conv_1", "conv_2", "hidden"], ["head"], positions=9)


@pytest.mark.parametrize(("kernel", "bias"), [("w", "b"), ("weight", "bias"), ("kernel", "b")])
def test_other_leaf_names_and_containers(kernel: str, bias: str) -> None:
    layers = [{kernel: jnp.ones((3, 2)), bias: jnp.zeros(2)}, {kernel: jnp.ones((2, 4))}]
    units = dense_chain({"mlp": layers}, ["mlp/0", "mlp/1"])
    paths = [axis.path for axis in units.group("mlp/0").axes]
    assert paths == [f"mlp/0/{kernel}", f"mlp/0/{bias}", f"mlp/1/{kernel}"]


def test_unit_names_with_slashes_in_the_keys() -> None:
    params = {"net/~/linear_0": {"w": jnp.ones((3, 2))}, "net/~/linear_1": {"w": jnp.ones((2, 2))}}
    assert dense_chain(params, list(params)).group("net/~/linear_0").size == 2


@pytest.mark.parametrize(
    ("layers", "norms", "message"),
    [
        (["a", "typo"], None, r"'typo', which has no kernel.*\['a', 'b', 'c'\]"),
        (["a", "c"], None, r"'a' puts out 4 units.*'c' has shape \(6, 2\) and reads 6"),
        (["a", "a"], None, "each once"),
        ([], None, "at least one layer"),
        (["a", "b"], {"c": "bn"}, r"norms names the layers \['c'\]"),
        (["a", "b"], {"a": "nothing"}, "holds none of"),
        (["a", "b"], {"a": "bn"}, r"'bn/scale' has shape \(5,\), but 'a' puts out 4"),
        (["b", "c"], None, "c/bias has shape"),
    ],
)
def test_bad_input_is_named(layers: list[str], norms: dict[str, str] | None, message: str) -> None:
    params = {
        "a": dense(5, 4),
        "b": dense(4, 6),
        "c": {"kernel": jnp.ones((6, 2)), "bias": jnp.zeros(3)},
        "bn": {"scale": jnp.ones(5)},
    }
    with pytest.raises(ValueError, match=message):
        dense_chain(params, layers, norms=norms)


def test_flatten_must_divide_exactly_and_stand_behind_a_convolution() -> None:
    params = {"conv": {"kernel": jnp.ones((3, 3, 1, 4))}, "head": dense(18, 2)}
    params |= {"wide": dense(8, 2), "first": dense(3, 4)}
    with pytest.raises(ValueError, match=r"'conv' puts out 4.*'head'.*reads 18"):
        dense_chain(params, ["conv", "head"])
    with pytest.raises(ValueError, match=r"'first' puts out 4.*'wide'.*reads 8"):
        dense_chain(params, ["first", "wide"])


def test_group_of_an_unknown_layer_lists_the_layers() -> None:
    with pytest.raises(ValueError, match=r"layer='x' is not in units; the layers are \['a', 'b'\]"):
        dense_chain({"a": dense(5, 4), "b": dense(4, 6)}, ["a", "b"]).group("x")


def test_identity_sources() -> None:
    sources = identity_sources({"a": {"kernel": jnp.ones((2, 3))}, "t": jnp.ones(())})
    assert sources["t"] == ()
    assert [index.tolist() for index in sources["a/kernel"]] == [[0, 1], [0, 1, 2]]
    assert all(index.dtype == np.int32 for index in sources["a/kernel"])
