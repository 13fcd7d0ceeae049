"""Growth actions: what they preserve, what they count, where every row came from, what they refuse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_structure as oxs
from optax_structure._tree import leaves_by_path, map_with_path
from optax_structure.extrema import Extrema
from optax_structure.growth import (
    add_connections,
    add_patches,
    apply_patches,
    connections,
    embed_patches,
    extrema_scores,
    insert_layer,
    patches,
    prune_connections,
    widen,
)
from optax_structure.structure import COMPONENTS, Growth, UnitAxis, UnitGroup, Units, dense_chain

KEY = jax.random.key(0)
NEW = COMPONENTS.index("new")
MLP = ["a", "b", "c", "head"]
CNN = ["conv_1", "conv_2", "hidden", "head"]
CNN_NORMS = {"conv_1": "bn_1", "conv_2": "bn_2"}


def mlp_params(sizes: tuple[int, ...] = (12, 9, 8, 7, 4), seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=(rows, columns)) / np.sqrt(rows), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=columns) * 0.1, jnp.float32),
        }
        for name, rows, columns in zip(MLP, sizes[:-1], sizes[1:], strict=True)
    }


def cnn_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)

    return {
        "conv_1": {"kernel": normal(3, 3, 2, 4), "bias": normal(1, 4)[0]},
        "bn_1": {"scale": 1 + normal(1, 4)[0], "bias": normal(1, 4)[0]},
        "conv_2": {"kernel": normal(3, 3, 4, 5)},
        "bn_2": {"scale": 1 + normal(1, 5)[0], "bias": normal(1, 5)[0]},
        "hidden": {"kernel": normal(5 * 5 * 5, 6), "bias": normal(1, 6)[0]},
        "head": {"kernel": normal(6, 3), "bias": normal(1, 3)[0]},
    }


def forward(params: Any, layers: Any, x: jax.Array, units: Units | None = None) -> jax.Array:
    """ReLU networks of the two kinds; a convolution is followed by its per-channel scale where it has one."""
    for name in layers:
        layer = params[name]
        if layer["kernel"].ndim == 4:
            y = jax.lax.conv_general_dilated(
                x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        else:
            x = x.reshape(x.shape[0], -1)
            y = x @ layer["kernel"]
        y = y + layer.get("bias", 0.0)
        if f"bn_{name[-1]}" in params and name.startswith("conv_"):
            y = y * params[f"bn_{name[-1]}"]["scale"] + params[f"bn_{name[-1]}"]["bias"]
        if units is not None:
            y = apply_patches(params, units, name, x, y)
        x = y if name == layers[-1] else jax.nn.relu(y)
    return x


def random_net_masks(params: Any, density: float, seed: int = 0) -> Any:
    """Random masks with an input for every unit, written apart from the library's."""
    rng = np.random.default_rng(seed)

    def mask_of(path: str, leaf: jax.Array) -> Any:
        if leaf.ndim < 2:
            return jnp.asarray(True)
        mask = rng.random(leaf.shape) < density
        flat = mask.reshape(-1, leaf.shape[-1])
        flat[rng.integers(len(flat), size=flat.shape[1]), np.arange(flat.shape[1])] = True
        return jnp.asarray(mask)

    return map_with_path(mask_of, params)


def masked(params: Any, masks: Any) -> Any:
    return jax.tree.map(lambda leaf, mask: jnp.asarray(np.asarray(leaf) * np.asarray(mask), leaf.dtype), params, masks)


def network(kind: str, density: float | None, seed: int = 0) -> tuple[Any, Any, Units, list[str], jax.Array]:
    params, layers, norms, shape = (
        (mlp_params(seed=seed), MLP, None, (16, 12))
        if kind == "mlp"
        else (cnn_params(seed), CNN, CNN_NORMS, (6, 5, 5, 2))
    )
    masks = jax.tree.map(lambda _: True, params) if density is None else random_net_masks(params, density, seed)
    x = jnp.asarray(np.random.default_rng(seed + 1).random(shape), jnp.float32)
    return masked(params, masks), masks, dense_chain(params, layers, norms=norms), list(layers), x


def count(masks: Any) -> int:
    return sum(int(np.sum(mask)) for mask in jax.tree.leaves(masks) if np.ndim(mask))


def check_record(grown: Growth, old: Any, *, values: bool = True) -> None:
    """One structure throughout, sources for every path, old entries where the sources say, zeros off the masks."""
    leaves, before = leaves_by_path(grown.params), leaves_by_path(old)
    structure = jax.tree.structure(grown.params)
    for tree in (grown.labels, grown.masks, grown.born):
        assert jax.tree.structure(tree) == structure
    assert set(grown.sources) == set(leaves) and grown.rename == {}
    for path, leaf in leaves.items():
        index = grown.sources[path]
        assert [len(i) for i in index] == list(leaf.shape) and all(i.dtype == np.int32 for i in index)
        if path in before:
            kept = [np.flatnonzero(i >= 0) for i in index]
            taken = [i[i >= 0] for i in index]
            if values:
                np.testing.assert_array_equal(np.asarray(leaf)[np.ix_(*kept)], np.asarray(before[path])[np.ix_(*taken)])
            assert [sorted(t.tolist()) for t in taken] == [list(range(size)) for size in before[path].shape]
        mask, born = leaves_by_path(grown.masks)[path], leaves_by_path(grown.born)[path]
        if np.ndim(mask):
            assert mask.shape == leaf.shape and mask.dtype == bool
            assert not np.any(np.asarray(leaf)[~np.asarray(mask)])
        if np.ndim(born):
            assert born.dtype == np.uint8 and born.shape == leaf.shape
            assert not np.any((np.asarray(born) != 255) & ~np.asarray(mask))
        else:
            assert born == 255


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [None, 0.25])
@pytest.mark.parametrize(
    ("kind", "layer"), [("mlp", "a"), ("mlp", "c"), ("cnn", "conv_1"), ("cnn", "conv_2"), ("cnn", "hidden")]
)
def test_widen_preserves_the_function_and_moves_rows_as_recorded(kind: str, layer: str, density: float | None) -> None:
    params, masks, units, layers, x = network(kind, density)
    grown = widen(params, "scaffold", masks, units, layer, 3, key=KEY)
    np.testing.assert_allclose(forward(grown.params, layers, x), forward(params, layers, x), atol=1e-5, rtol=0)
    check_record(grown, params)
    norms = CNN_NORMS if kind == "cnn" else None
    assert grown.units == dense_chain(grown.params, layers, norms=norms)
    for group in grown.units.groups:
        for axis in group.axes:
            index = grown.sources[axis.path][axis.axis]
            assert (index < 0).sum() == (3 * axis.repeats if group.layer == layer else 0)


def test_widening_before_a_flatten_puts_new_rows_at_every_position() -> None:
    params, masks, units, _, _ = network("cnn", None)
    grown = widen(params, "scaffold", masks, units, "conv_2", 2, key=KEY)
    expected = [r * 5 + u if u < 5 else -1 for r in range(25) for u in range(7)]
    assert grown.sources["hidden/kernel"][0].tolist() == expected
    rows = np.asarray(grown.params["hidden"]["kernel"]).reshape(25, 7, 6)
    np.testing.assert_array_equal(rows[:, :5], np.asarray(params["hidden"]["kernel"]).reshape(25, 5, 6))
    np.testing.assert_array_equal(rows[:, 5:], 0)


def test_new_weights_biases_and_scales() -> None:
    params, masks, units, _, _ = network("cnn", None)
    grown = widen(params, "scaffold", masks, units, "conv_1", 400, key=KEY).params
    incoming = np.asarray(grown["conv_1"]["kernel"])[..., 4:]
    # He: variance 2 / fan-in, fan-in 3 * 3 * 2 (7200 draws: 4 % is more than three standard errors).
    assert incoming.std() == pytest.approx(np.sqrt(2 / 18), rel=0.04)
    flat = incoming.reshape(18, -1)
    assert (flat.sum(0) >= 0).all() and (flat < 0).any(0).mean() > 0.9
    np.testing.assert_array_equal(np.asarray(grown["conv_1"]["bias"])[4:], 0)
    np.testing.assert_array_equal(np.asarray(grown["bn_1"]["scale"])[4:], 1)
    np.testing.assert_array_equal(np.asarray(grown["bn_1"]["bias"])[4:], 0)
    np.testing.assert_array_equal(np.asarray(grown["conv_2"]["kernel"])[:, :, 4:], 0)


def test_fan_in_counts_living_connections_only() -> None:
    params = {"a": {"kernel": jnp.zeros((2000, 2))}, "head": {"kernel": jnp.ones((2, 1))}}
    masks = {"a": {"kernel": jnp.asarray(np.arange(4000).reshape(2000, 2) % 100 == 0)}, "head": {"kernel": True}}
    grown = widen(params, "scaffold", masks, dense_chain(params, ["a", "head"]), "a", 100, key=KEY)
    mask = np.asarray(grown.masks["a"]["kernel"])[:, 2:]
    np.testing.assert_array_equal(mask.sum(0), 20)  # 1 % of 2000 inputs each
    assert np.asarray(grown.params["a"]["kernel"])[:, 2:][mask].std() == pytest.approx(np.sqrt(2 / 20), rel=0.07)


@pytest.mark.parametrize("density", [None, 0.01, 0.5])
def test_widened_sparse_leaves_have_an_exact_count_and_one_connection_each(density: float | None) -> None:
    params, masks, units, _, _ = network("cnn", 0.2)
    grown = widen(params, "scaffold", masks, units, "conv_2", 3, key=KEY, density=density)
    for layer, block, unit_axis in (("conv_2", np.s_[..., 5:], 3), ("hidden", np.s_[:, 5:], 1)):
        old, new = np.asarray(masks[layer]["kernel"]), np.asarray(grown.masks[layer]["kernel"])
        born = np.asarray(grown.born[layer]["kernel"])
        if layer == "hidden":
            new, born = new.reshape(25, 8, 6), born.reshape(25, 8, 6)
        fresh = new[block]
        wanted = max(3, round((density or old.mean()) * fresh.size))
        assert fresh.sum() == wanted
        each = fresh.sum(axis=tuple(a for a in range(fresh.ndim) if a != unit_axis))
        assert each.min() >= 1 and each.max() - each.min() <= 1
        np.testing.assert_array_equal(born[block], np.where(fresh, NEW, 255))
        assert new.sum() == old.sum() + wanted and (born != 255).sum() == wanted
    assert np.ndim(grown.born["head"]["kernel"]) == 0 and np.ndim(grown.masks["bn_2"]["scale"]) == 0


def test_first_connections_go_to_units_that_the_input_and_the_output_reach() -> None:
    # Of 6 inputs of b only unit 2 of a is fed; of 5 units of b only unit 3 reaches the head.
    params = {"a": {"kernel": jnp.ones((4, 6))}, "b": {"kernel": jnp.ones((6, 5))}, "c": {"kernel": jnp.ones((5, 5))}}
    params["head"] = {"kernel": jnp.ones((5, 2))}
    fed = jnp.zeros((4, 6), bool).at[0, 2].set(True)
    heard = jnp.zeros((5, 5), bool).at[3, 0].set(True)
    masks = {
        "a": {"kernel": fed},
        "b": {"kernel": jnp.zeros((6, 5), bool)},
        "c": {"kernel": heard},
        "head": {"kernel": True},
    }
    grown = widen(params, "scaffold", masks, dense_chain(params, MLP), "b", 4, key=KEY, density=0.01)
    np.testing.assert_array_equal(np.argwhere(np.asarray(grown.masks["b"]["kernel"])[:, 5:])[:, 0], 2)
    # The outputs of b are the inputs of c: the units of c that reach the head are all of them, the head is dense.
    assert np.asarray(grown.masks["c"]["kernel"])[5:].any(1).all()
    above = widen(params, "scaffold", masks, dense_chain(params, MLP), "a", 4, key=KEY, density=0.01)
    np.testing.assert_array_equal(np.argwhere(np.asarray(above.masks["b"]["kernel"])[6:])[:, 1], 3)


@given(
    sizes=st.lists(st.integers(1, 5), min_size=5, max_size=5),
    layer=st.sampled_from(MLP[:-1]),
    extra=st.integers(1, 4),
    density=st.sampled_from([None, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None)
def test_widen_and_insert_keep_every_old_entry(
    sizes: list[int], layer: str, extra: int, density: float | None, seed: int
) -> None:
    params = mlp_params(tuple(sizes), seed)
    masks = jax.tree.map(lambda _: True, params) if density is None else random_net_masks(params, density, seed)
    params = masked(params, masks)
    units, key = dense_chain(params, MLP), jax.random.key(seed)
    wide = widen(params, "scaffold", masks, units, layer, extra, key=key)
    check_record(wide, params)
    deep = insert_layer(wide.params, wide.labels, wide.masks, wide.units, layer, key=key)
    check_record(deep, wide.params)
    x = np.random.default_rng(seed).normal(size=(3, sizes[0])).astype(np.float32)

    def run(tree: Any, layers: Any) -> np.ndarray:
        y = x
        for name in layers:
            y = y @ np.asarray(tree[name]["kernel"]) + np.asarray(tree[name]["bias"])
            y = y if name == "head" else np.maximum(y, 0)
        return y

    np.testing.assert_allclose(run(wide.params, MLP), run(params, MLP), atol=1e-5)
    np.testing.assert_allclose(run(deep.params, deep.units.layers), run(params, MLP), atol=1e-5)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize(("kind", "layer"), [("mlp", "b"), ("cnn", "conv_1"), ("cnn", "conv_2"), ("cnn", "hidden")])
def test_insert_layer_preserves_the_function(kind: str, layer: str, density: float | None) -> None:
    params, masks, units, layers, x = network(kind, density)
    grown = insert_layer(params, "scaffold", masks, units, layer, key=KEY)
    after = [*layers[: layers.index(layer) + 1], f"{layer}_next", *layers[layers.index(layer) + 1 :]]
    assert grown.units.layers == tuple(after)
    np.testing.assert_allclose(forward(grown.params, after, x), forward(params, layers, x), atol=1e-5, rtol=0)
    check_record(grown, params)
    norms = CNN_NORMS if kind == "cnn" else None
    assert grown.units == dense_chain(grown.params, after, norms=norms)
    new = grown.params[f"{layer}_next"]
    assert set(new) == set(params[layer])
    assert all((i == -1).all() for leaf in new for i in grown.sources[f"{layer}_next/{leaf}"])
    assert set(leaves_by_path(grown.labels[f"{layer}_next"]).values()) == {"new"}
    mask, born = grown.masks[f"{layer}_next"]["kernel"], grown.born[f"{layer}_next"]["kernel"]
    if density is None:
        assert mask is True and np.ndim(born) == 0
    else:
        size = new["kernel"].shape[-1]
        wanted = round(float(np.mean(masks[layer]["kernel"])) * mask.size)
        assert mask.sum() == max(size, wanted)
        np.testing.assert_array_equal(born, np.where(mask, NEW, 255))
        assert np.count_nonzero(new["kernel"]) == size


def test_insert_layer_names_density_label_and_nesting() -> None:
    inner = mlp_params()
    params = {"net": {"body": inner}, "other": jnp.ones(3)}
    layers = [f"net/body/{name}" for name in MLP]
    units = dense_chain(params, layers)
    first = insert_layer(params, "scaffold", True, units, layers[1], key=KEY, density=0.4, label="fresh")
    second = insert_layer(first.params, first.labels, first.masks, first.units, layers[1], key=KEY)
    third = insert_layer(
        second.params, second.labels, second.masks, second.units, layers[1], key=KEY, name="net/body/named"
    )
    assert list(third.units.layers)[1:5] == [layers[1], "net/body/named", f"{layers[1]}_next_2", f"{layers[1]}_next"]
    assert first.masks["net"]["body"]["b_next"]["kernel"].sum() == round(0.4 * 64)
    assert first.labels["net"]["body"]["b_next"]["bias"] == "fresh"
    assert "named" not in params["net"]["body"]


def gradients_within_two_steps(params: Any, masks: Any, layers: list[str], x: jax.Array) -> tuple[Any, Any]:
    """Gradients at the first and the second step of masked gradient descent."""
    target = jax.random.normal(jax.random.key(5), forward(params, layers, x).shape)
    grad = jax.jit(jax.grad(lambda tree: jnp.mean((forward(tree, layers, x) - target) ** 2)))
    first = masked(grad(params), masks)
    second = masked(grad(jax.tree.map(lambda leaf, g: leaf - 1e-3 * g, params, first)), masks)
    return first, second


@pytest.mark.parametrize(
    ("kind", "layer", "density"),
    [
        ("mlp", "a", 0.2),
        ("cnn", "conv_1", 0.3),
        pytest.param("mlp", "a", None, marks=pytest.mark.slow),
        pytest.param("cnn", "conv_2", 0.1, marks=pytest.mark.slow),
    ],
)
def test_every_new_unit_has_a_gradient_within_two_steps(kind: str, layer: str, density: float | None) -> None:
    params, masks, units, layers, x = network(kind, density, seed=3)
    x = jnp.concatenate([x, x[:, ::-1], 1 - x])
    # Biases that keep every old unit alive: every new one then has a living source and a living reader.
    params = map_with_path(lambda path, leaf: 1.0 + jnp.abs(leaf) if path.endswith("bias") else leaf, params)
    grown = widen(params, "scaffold", masks, units, layer, 5, key=KEY)
    first, second = map(leaves_by_path, gradients_within_two_steps(grown.params, grown.masks, layers, x))
    for axis in grown.units.group(layer).axes:
        new = grown.sources[axis.path][axis.axis].reshape(axis.repeats, -1)[0] < 0
        step = first if axis.role == "outgoing" else second
        sizes = np.moveaxis(np.abs(np.asarray(step[axis.path])), axis.axis, 0)
        per_unit = sizes.reshape(axis.repeats, len(new), -1).sum((0, 2))
        assert (per_unit[new] > 0).all(), (axis, per_unit)
    deep = insert_layer(params, "scaffold", masks, units, layer, key=KEY)
    first, second = gradients_within_two_steps(deep.params, deep.masks, list(deep.units.layers), x)
    (reader,) = (axis for axis in deep.units.group(f"{layer}_next").axes if axis.role == "outgoing")
    read = np.broadcast_to(leaves_by_path(deep.masks)[reader.path], leaves_by_path(params)[reader.path].shape)
    read = np.moveaxis(read, reader.axis, 0).reshape(reader.repeats, units.group(layer).size, -1).any((0, 2))
    sizes = np.abs(np.asarray(first[f"{layer}_next"]["kernel"])).reshape(-1, len(read)).sum(0)
    np.testing.assert_array_equal(sizes > 0, read)  # a new unit has the readers of its source, if it has any


def test_a_kernel_that_reads_the_layer_it_makes_widens_on_both_axes() -> None:
    params = {
        "in": {"kernel": jnp.ones((2, 3))},
        "loop": {"kernel": jnp.arange(9.0).reshape(3, 3)},
        "out": {"kernel": jnp.ones((3, 1))},
    }
    axes = (UnitAxis("in/kernel", 1, "incoming"), UnitAxis("loop/kernel", 1, "incoming"))
    axes += (UnitAxis("loop/kernel", 0, "outgoing"), UnitAxis("out/kernel", 0, "outgoing"))
    ends = (
        UnitGroup("input", 2, (UnitAxis("in/kernel", 0, "outgoing"),)),
        UnitGroup("out", 1, (UnitAxis("out/kernel", 1, "incoming"),)),
    )
    units = Units((ends[0], UnitGroup("state", 3, axes), ends[1]))
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    grown = widen(params, "scaffold", masks, units, "state", 2, key=KEY)
    check_record(grown, params)
    loop = np.asarray(grown.params["loop"]["kernel"])
    assert loop.shape == (5, 5) and (loop[:3, 3:] != 0).all() and not loop[3:].any()


def test_widen_moves_what_patches_read_behind_a_flatten_and_sets_a_label() -> None:
    params, masks, units, layers, x = network("cnn", None)
    patched = add_patches(params, "scaffold", masks, units, "hidden", 2, key=KEY, size=5)
    tree = map_with_path(lambda path, leaf: leaf + 0.3 if "/up/" in path else leaf, patched.params)
    before = forward(tree, layers, x, patched.units)
    assert np.abs(before - forward(params, layers, x)).max() > 1e-3
    grown = widen(tree, patched.labels, patched.masks, patched.units, "conv_2", 2, key=KEY, label="new")
    np.testing.assert_allclose(forward(grown.params, layers, x, grown.units), before, atol=1e-5, rtol=0)
    changed = {path for path, label in leaves_by_path(grown.labels).items() if label == "new"}
    assert changed == {"conv_2/kernel", "bn_2/scale", "bn_2/bias", "hidden/kernel"}


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6, lambda x: x])
def test_idempotent_activations_pass(activation: Any) -> None:
    params, masks, units, _, _ = network("mlp", None)
    assert "a_next" in insert_layer(params, "s", masks, units, "a", key=KEY, activation=activation).params


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.gelu, jax.nn.leaky_relu, jax.nn.sigmoid])
def test_other_activations_are_refused_by_name(activation: Any) -> None:
    params, masks, units, _, _ = network("mlp", None)
    with pytest.raises(ValueError, match=f"activation={activation.__name__}.*not idempotent.*residual"):
        insert_layer(params, "s", masks, units, "a", key=KEY, activation=activation)


def test_layers_in_lists_widen_but_take_no_new_layer() -> None:
    params = {"layers": list(mlp_params().values())}
    layers = [f"layers/{i}" for i in range(4)]
    units = dense_chain(params, layers)
    grown = widen(params, "scaffold", True, units, "layers/1", 2, key=KEY)
    check_record(grown, params)
    assert isinstance(grown.params["layers"], list) and grown.params["layers"][1]["bias"].shape == (10,)
    with pytest.raises(ValueError, match="'layers/1' stands in a list, where no layer can be inserted by name"):
        insert_layer(params, "scaffold", True, units, "layers/1", key=KEY)
    with pytest.raises(ValueError, match="params are a tuple at the root"):
        inside = tuple(mlp_params().values())
        add_patches(inside, "scaffold", True, dense_chain(inside, list("0123")), "1", 1, key=KEY)


def test_flax_containers_keep_their_type() -> None:
    frozen = pytest.importorskip("flax.core").freeze(mlp_params())
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.State({name: {k: nnx.Param(v) for k, v in leaves.items()} for name, leaves in mlp_params().items()})
    for tree in (frozen, state):
        units = dense_chain(tree, MLP)
        labels = map_with_path(lambda path, _: "scaffold", tree)
        for grown in (
            widen(tree, labels, True, units, "b", 2, key=KEY),
            insert_layer(tree, labels, True, units, "b", key=KEY),
            add_patches(tree, labels, True, units, "b", 1, key=KEY),
        ):
            check_record(grown, tree)
            assert type(grown.params) is type(tree)
    assert isinstance(
        insert_layer(state, "s", True, dense_chain(state, MLP), "b", key=KEY).params["b_next"]["bias"], nnx.Param
    )


# Connections ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(seed=st.integers(0, 10_000), number=st.integers(1, 60), init=st.sampled_from(["zeros", "fan_in"]))
@settings(max_examples=25, deadline=None)
def test_add_and_prune_count_exactly(seed: int, number: int, init: Any) -> None:
    params, masks, units, _, _ = network("mlp", 0.2, seed)
    grown = add_connections(
        params, "scaffold", masks, units, number, key=jax.random.key(seed), init=init, component="neck"
    )
    check_record(grown, params, values=init == "zeros")
    assert count(grown.masks) == count(masks) + number
    births = [np.asarray(born) for born in jax.tree.leaves(grown.born) if np.ndim(born)]
    assert sum((born == COMPONENTS.index("neck")).sum() for born in births) == number
    assert sum((born != 255).sum() for born in births) == number
    for old, new, leaf, was in zip(*map(jax.tree.leaves, (masks, grown.masks, grown.params, params)), strict=True):
        if np.ndim(old):
            assert not np.any(np.asarray(old) & ~np.asarray(new))
            np.testing.assert_array_equal(np.asarray(leaf)[np.asarray(old)], np.asarray(was)[np.asarray(old)])
            fresh = np.asarray(leaf)[np.asarray(new) & ~np.asarray(old)]
            assert (fresh != 0).all() == (init == "fan_in") or not fresh.size
    pruned = prune_connections(grown.params, "scaffold", grown.masks, units, number, key=jax.random.key(seed))
    assert count(pruned.masks) == count(masks)
    assert all(np.ndim(born) == 0 for born in jax.tree.leaves(pruned.born))
    if init == "zeros":  # the weakest are the ones just added
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (pruned.masks, masks)), strict=True))


def test_add_takes_the_highest_scores_among_absent_connections_of_all_leaves() -> None:
    params, masks, units, _, _ = network("mlp", 0.3)
    rng = np.random.default_rng(0)
    scores = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    grown = add_connections(params, "scaffold", masks, units, 17, key=KEY, scores=scores)
    pairs = [
        (s, m, g) for s, m, g in zip(*map(jax.tree.leaves, (scores, masks, grown.masks)), strict=True) if np.ndim(m)
    ]
    absent = np.concatenate([np.asarray(s)[~np.asarray(m)] for s, m, _ in pairs])
    chosen = np.concatenate([np.asarray(s)[np.asarray(g) & ~np.asarray(m)] for s, m, g in pairs])
    np.testing.assert_array_equal(np.sort(chosen), np.sort(absent)[-17:])


def test_prune_takes_the_weakest_over_all_leaves_or_the_lowest_scores() -> None:
    params, masks, units, _, _ = network("mlp", 0.3)
    for scores in (None, jax.tree.map(lambda leaf: -jnp.abs(leaf), params)):
        pruned = prune_connections(params, "scaffold", masks, units, 11, scores=scores)
        sign = 1 if scores is None else -1
        rows = [r for r in zip(*map(jax.tree.leaves, (params, masks, pruned.masks)), strict=True) if np.ndim(r[1])]
        present = np.sort(np.concatenate([sign * np.abs(np.asarray(p))[np.asarray(m)] for p, m, _ in rows]))
        gone = np.concatenate([sign * np.abs(np.asarray(p))[np.asarray(m) & ~np.asarray(n)] for p, m, n in rows])
        np.testing.assert_array_equal(np.sort(gone), present[:11])
        check_pruned = zip(*map(jax.tree.leaves, (pruned.params, pruned.masks)), strict=True)
        assert all(not np.asarray(p)[~np.asarray(m)].any() for p, m in check_pruned if np.ndim(m))


def test_ties_are_broken_at_random_with_a_key_and_by_position_without() -> None:
    params = {"head": {"kernel": jnp.asarray([[1.0, 1.0, 1.0, 1.0, 9.0, 0.5]])}}
    masks = {"head": {"kernel": jnp.ones((1, 6), bool)}}
    units = dense_chain(params, ["head"])

    def gone(key: Any) -> tuple[int, ...]:
        new = prune_connections(params, "s", masks, units, 2, key=key).masks["head"]["kernel"]
        return tuple(np.flatnonzero(~np.asarray(new[0])).tolist())

    assert gone(None) == (0, 5)
    drawn = {gone(jax.random.key(seed)) for seed in range(20)}
    assert drawn == {(0, 5), (1, 5), (2, 5), (3, 5)}


def test_extrema_scores_raise_inputs_of_dead_and_outputs_of_saturated_units() -> None:
    params, masks, units, _, _ = network("cnn", 0.3)
    dead = {"conv_2": jnp.asarray([True, False, False, False, True]), "pool": jnp.ones(2, bool)}
    saturated = {"conv_2": jnp.asarray([False, True, False, False, False]), "hidden": jnp.arange(6) == 2}
    scores = extrema_scores(params, masks, units, Extrema(dead, saturated), key=KEY)
    assert jax.tree.structure(scores) == jax.tree.structure(params) and np.ndim(scores["bn_1"]["scale"]) == 0
    raised = jax.tree.map(lambda s: np.floor(np.asarray(s)), scores)
    np.testing.assert_array_equal(raised["conv_2"]["kernel"], np.broadcast_to([1.0, 0, 0, 0, 1], (3, 3, 4, 5)))
    np.testing.assert_array_equal(
        raised["hidden"]["kernel"].reshape(25, 5, 6), np.broadcast_to(np.eye(5)[1][:, None], (25, 5, 6))
    )
    np.testing.assert_array_equal(raised["head"]["kernel"], np.repeat(np.eye(6)[2][:, None], 3, 1))
    np.testing.assert_array_equal(raised["conv_1"]["kernel"], 0)
    both = add_connections(params, "s", masks, units, 10, key=KEY, scores=scores)
    assert count(both.masks) == count(masks) + 10


def test_embedded_blocks_connect_saturated_to_dead_units() -> None:
    params, masks, units, layers, x = network("mlp", 0.1)
    dead = {"b": jnp.arange(8) < 4}
    saturated = {"a": jnp.arange(9) >= 7}
    grown = embed_patches(params, "scaffold", masks, units, 2, key=KEY, size=2, extrema=Extrema(dead, saturated))
    check_record(grown, params)
    mask, old = np.asarray(grown.masks["b"]["kernel"]), np.asarray(masks["b"]["kernel"])
    new = np.asarray(grown.born["b"]["kernel"]) == COMPONENTS.index("patch")
    np.testing.assert_array_equal(new, mask & ~old)
    # Two blocks of 2 x 2: between them they write each dead unit once, and one of them reads both saturated ones.
    np.testing.assert_array_equal(mask.sum(0)[:4] >= 2, True)
    assert sum(mask[np.ix_([7, 8], [i, j])].all() for i in range(4) for j in range(i)) >= 1
    assert all(np.array_equal(masks[k]["kernel"], grown.masks[k]["kernel"]) for k in ("a", "c", "head"))
    np.testing.assert_array_equal(forward(grown.params, layers, x), forward(params, layers, x))


def test_embedded_blocks_trim_exactly_and_leave_existing_weights() -> None:
    params, masks, units, _, _ = network("mlp", 0.3)
    free = embed_patches(params, "scaffold", masks, units, 3, key=KEY, size=3)
    check_record(free, params)
    new = count(free.masks) - count(masks)
    assert new > 5
    for limit in (0, 5, 1000):
        grown = embed_patches(params, "scaffold", masks, units, 3, key=KEY, size=3, init="fan_in", max_new=limit)
        check_record(grown, params, values=False)
        assert count(grown.masks) - count(masks) == min(limit, new)
        for whole, old, mask, trimmed, leaf in zip(
            *map(jax.tree.leaves, (free.masks, params, masks, grown.masks, grown.params)), strict=True
        ):
            if np.ndim(mask):
                kept = np.asarray(mask)
                np.testing.assert_array_equal(np.asarray(leaf)[kept], np.asarray(old)[kept])
                assert not np.any(np.asarray(trimmed) & ~np.asarray(whole)) and not np.any(kept & ~np.asarray(trimmed))


def test_patches_as_tiles_keep_masks_of_tiles_and_the_network_fast() -> None:
    params, _, units, layers, x = network("mlp", 1.0)
    masks = oxs.random_masks(KEY, params, 0.3, pattern=oxs.tiles(4))
    masks["head"]["kernel"] = True
    params = oxs.apply_masks(params, masks)
    # 12 -> 9 -> 8 -> 7 units: the grids are 3 x 3, 3 x 2 and 2 x 2, and cut off at their edges.
    extrema = Extrema({"b": jnp.arange(8) == 1, "c": jnp.zeros(7, bool)}, {"a": jnp.arange(9) == 8})
    touched = 0
    for seed in range(8):
        grown = embed_patches(params, "s", masks, units, 1, key=jax.random.key(seed), tile=4, extrema=extrema)
        check_record(grown, params)
        new = np.asarray(grown.born["b"]["kernel"]) > 0
        assert new.any()
        touched += new[8, :4].any() or new[:, 1].any()
        for name in ("a", "b", "c"):
            assert oxs.tiles(4).holds(grown.masks[name]["kernel"])
        assert count(grown.masks) > count(masks)
    assert touched == 8  # while tiles that read the saturated unit or write the dead one are left, no other is taken
    every = embed_patches(params, "s", masks, units, left_tiles(masks), key=KEY, tile=4, init="fan_in")
    assert all(np.asarray(every.masks[name]["kernel"]).all() for name in ("a", "b", "c"))
    np.testing.assert_array_equal(every.params["b"]["kernel"] == 0, np.zeros((9, 8)))
    values, index = oxs.blocks_from_kernel(grown.params["b"]["kernel"], grown.masks["b"]["kernel"], 4)
    np.testing.assert_allclose(
        oxs.block_matmul(x[:, :9], values, index, 8), x[:, :9] @ grown.params["b"]["kernel"], atol=1e-5
    )
    np.testing.assert_array_equal(forward(grown.params, layers, x), forward(params, layers, x))


def left_tiles(masks: Any) -> int:
    """Tiles of 4 x 4 that are not whole, counted one by one."""
    kernels = [np.asarray(masks[name]["kernel"]) for name in ("a", "b", "c")]
    places = [(of, i, j) for of in kernels for i in range(0, of.shape[0], 4) for j in range(0, of.shape[1], 4)]
    return sum(not of[i : i + 4, j : j + 4].all() for of, i, j in places)


def test_whole_blocks_are_dense_through_every_tap_of_a_convolution() -> None:
    params, masks, units, _, _ = network("cnn", 0.05)
    extrema = Extrema({"conv_2": jnp.asarray([True, True, False, False, False])}, {})
    grown = embed_patches(params, "s", masks, units, 1, key=KEY, size=2, extrema=extrema)
    through = np.asarray(grown.masks["conv_2"]["kernel"]).all((0, 1))
    assert through.sum() == 4 and through[:, :2].sum() == 4 and through.any(1).sum() == 2


def test_cores_compile_once_for_all_counts() -> None:
    params, masks, units, _, _ = network("mlp", 0.15)
    extrema = Extrema({"b": jnp.arange(8) < 4}, {"a": jnp.arange(9) >= 7})

    def event(number: int, key: jax.Array, params: Any, masks: Any) -> tuple[Any, Any]:
        scores = extrema_scores(params, masks, units, extrema, key=key)
        grown = add_connections(params, "s", masks, units, number, key=key, scores=scores)
        grown = embed_patches(grown.params, "s", grown.masks, units, number, key=key, size=2, max_new=number)
        grown = prune_connections(grown.params, "s", grown.masks, units, number, key=key)
        return grown.params, grown.masks

    params, masks = event(1, KEY, params, masks)
    cores = (connections._add, connections._prune, connections._score, patches._embed)
    sizes = [core._cache_size() for core in cores]
    for number in (2, 5, 8):
        before = count(masks)
        params, masks = event(number, jax.random.key(number), params, masks)
        assert count(masks) <= before + number
    assert [core._cache_size() for core in cores] == sizes


def test_counts_may_be_traced() -> None:
    params, masks, units, _, _ = network("mlp", 0.2)

    @jax.jit
    def grow(number: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        grown = add_connections(params, "s", masks, units, number, key=key)
        return grown.params, prune_connections(grown.params, "s", grown.masks, units, number - 3, key=key).masks

    assert count(grow(jnp.int32(9), KEY)[1]) == count(masks) + 3
    assert count(grow(jnp.int32(4), KEY)[1]) == count(masks) + 3
    assert grow._cache_size() <= 1


# Patches -------------------------------------------------------------------------------------------------------------


def test_patches_preserve_the_function_at_birth_and_match_a_loop_afterwards() -> None:
    params, masks, units, layers, x = network("mlp", 0.4)
    grown = add_patches(params, "scaffold", masks, units, "b", 3, key=KEY, size=4, hidden=5)
    grown = add_patches(grown.params, grown.labels, grown.masks, grown.units, "b", 1, key=KEY, size=2, hidden=3)
    grown = add_patches(grown.params, grown.labels, grown.masks, grown.units, "head", 2, key=KEY)
    assert [patch.name for patch in grown.units.patches] == [f"patch_{i}" for i in range(6)]
    assert [len(patch.writes) for patch in grown.units.patches] == [4, 4, 4, 2, 4, 4]  # the head has 4 units, size is 8
    np.testing.assert_array_equal(forward(grown.params, layers, x, grown.units), forward(params, layers, x))
    assert set(leaves_by_path(grown.labels["patch_3"]).values()) == {"patch"}
    assert grown.masks["patch_0"]["down"]["kernel"] is True

    rng = np.random.default_rng(0)
    tree = {
        k: jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), jnp.float32), v) if k.startswith("patch") else v
        for k, v in grown.params.items()
    }
    inputs = rng.normal(size=(2, 3, 9)).astype(np.float32)
    output = rng.normal(size=(2, 3, 8)).astype(np.float32)
    expected = output.copy()
    for patch in grown.units.patches:
        if patch.layer == "b":
            down, up = tree[patch.name]["down"], tree[patch.name]["up"]
            hidden = np.maximum(
                inputs[..., list(patch.reads)] @ np.asarray(down["kernel"]) + np.asarray(down["bias"]), 0
            )
            expected[..., list(patch.writes)] += hidden @ np.asarray(up["kernel"])
    np.testing.assert_allclose(apply_patches(tree, grown.units, "b", inputs, jnp.asarray(output)), expected, atol=1e-4)
    assert apply_patches(tree, grown.units, "c", inputs, output) is output


def test_patches_write_dead_units_and_read_saturated_ones() -> None:
    params, masks, units, _, _ = network("mlp", None)
    extrema = Extrema({"b": jnp.arange(8) < 3, "a": jnp.arange(9) < 6}, {"a": jnp.arange(9) == 8})
    grown = add_patches(params, "s", masks, units, "b", 2, key=KEY, size=3, extrema=extrema)
    first, second = grown.units.patches
    assert set(first.writes) == {0, 1, 2} and len(set(second.writes)) == 3
    assert set(first.reads) == {6, 7, 8}  # the saturated input, then the two others that are not dead
    assert len(set(second.reads)) == 3 and {6, 7, 8} <= set(second.reads)
    down = np.asarray(
        add_patches(params, "s", masks, units, "a", 300, key=KEY, size=4).params["patch_9"]["down"]["kernel"]
    )
    assert down.shape == (4, 8) and 0 < down.std() < 2


# Devices, dtypes, errors ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_growth_keeps_sharding_dtype_and_values_on_a_mesh(axis_type: AxisType) -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    params = {name: mlp_params((12, 8, 4, 4, 4))[name] for name in ("a", "b")}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    masks = random_net_masks(params, 0.3)
    params, units = masked(params, masks), dense_chain(params, ["a", "b"])

    def spread(leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec(None, "x") if np.ndim(leaf) == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    on_mesh, masks_on_mesh = jax.tree.map(spread, params), jax.tree.map(spread, masks)
    scores = extrema_scores(on_mesh, masks_on_mesh, units, Extrema({"a": jnp.arange(8) < 4}, {}), key=KEY)
    actions = [
        lambda p, m: add_connections(p, "s", m, units, 9, key=KEY, init="fan_in", scores=scores),
        lambda p, m: prune_connections(p, "s", m, units, 9, key=KEY),
        lambda p, m: embed_patches(p, "s", m, units, 3, key=KEY, size=3, max_new=7),
        lambda p, m: widen(p, "s", m, units, "a", 2, key=KEY),
        lambda p, m: widen(p, "s", m, units, "a", 1, key=KEY),
        lambda p, m: insert_layer(p, "s", m, units, "a", key=KEY),
        lambda p, m: add_patches(p, "s", m, units, "a", 1, key=KEY),
    ]
    for number, action in enumerate(actions):
        grown, plain = action(on_mesh, masks_on_mesh), action(params, masks)
        for path, leaf in leaves_by_path(grown.params).items():
            assert leaf.dtype == jnp.bfloat16
            assert leaf.sharding.device_set == set(mesh.devices.flat), (number, path)
            old = leaves_by_path(on_mesh).get(path)
            if old is not None and leaf.shape[-1] % 2 == 0:
                assert leaf.sharding == old.sharding, (number, path)
            np.testing.assert_array_equal(leaf, leaves_by_path(plain.params)[path])
        for path, mask in leaves_by_path(grown.masks).items():
            if np.ndim(mask):
                assert mask.sharding.device_set == set(mesh.devices.flat)
                np.testing.assert_array_equal(mask, leaves_by_path(plain.masks)[path])


def test_uncommitted_arrays_stay_uncommitted() -> None:
    params, masks, units, _, _ = network("mlp", 0.3)
    for grown in (
        add_connections(params, "s", masks, units, 9, key=KEY),
        widen(params, "s", masks, units, "b", 2, key=KEY),
    ):
        assert not any(leaf.committed for leaf in jax.tree.leaves((grown.params, grown.masks)))


def test_bad_input_is_named() -> None:
    params, masks, units, _, _ = network("mlp", 0.3)
    args = (params, "s", masks, units)
    present, size = count(masks), sum(mask.size for mask in jax.tree.leaves(masks) if np.ndim(mask))
    extrema = Extrema({"b": jnp.ones(3, bool)}, {})
    cases = [
        (lambda: add_connections(*args, 0, key=KEY), "count=0 must be an integer of at least 1"),
        (lambda: add_connections(*args, 1.5, key=KEY), "count=1.5"),
        (lambda: add_connections(*args, size, key=KEY), f"count={size} connections.*lack only {size - present}"),
        (lambda: prune_connections(*args, present + 1), f"count={present + 1} .*only {present} exist"),
        (lambda: add_connections(*args, 3, key=KEY, component="pach"), "component='pach' is unknown"),
        (lambda: add_connections(*args, 3, key=KEY, init="ones"), "init='ones' is unknown"),
        (lambda: add_connections(*args, 3, key=KEY, scores={"a": 1}), "scores does not have the structure"),
        (
            lambda: add_connections(*args, 3, key=KEY, scores=map_with_path(lambda p, x: x.T[:1], params)),
            "scores have shape",
        ),
        (lambda: add_connections(params, "s", True, units, 3, key=KEY), "no leaf is sparse"),
        (lambda: embed_patches(params, "s", True, units, 3, key=KEY), "sparse in no kernel"),
        (lambda: embed_patches(*args, 3, key=KEY, size=0), "size=0"),
        (lambda: embed_patches(*args, 3, key=KEY, max_new=-1), "max_new=-1"),
        (lambda: embed_patches(*args, 3, key=KEY, tile=0), "tile=0"),
        (lambda: embed_patches(*args, 3, key=KEY, tile=4, max_new=5), "max_new=5 would leave tiles"),
        (lambda: embed_patches(*args, 300, key=KEY, tile=4), "count=300 tiles of 4: .* only"),
        (lambda: embed_patches(*args, 1, key=KEY, tile=99), "the dense kernels as large have only 0"),
        (lambda: embed_patches(*args, 3, key=KEY, extrema=extrema), r"extrema.dead\['b'\] has shape \(3,\)"),
        (
            lambda: extrema_scores(params, masks, units, Extrema({"x": jnp.ones(3)}, {}), key=KEY),
            r"layers \['x'\], none",
        ),
        (lambda: widen(*args, "x", 1, key=KEY), "layer='x' is not in units"),
        (lambda: widen(*args, "input", 1, key=KEY), "'input' is the input of the network and cannot be widened"),
        (lambda: widen(*args, "head", 1, key=KEY), "'head' is the output of the network and cannot be widened"),
        (lambda: widen(*args, "b", 0, key=KEY), "count=0"),
        (lambda: widen(*args, "b", 1, key=KEY, density=1.2), "density=1.2"),
        (
            lambda: widen({**params, "b": params["a"]}, "s", True, units, "b", 1, key=KEY),
            "units do not fit params: 'b/kernel'",
        ),
        (lambda: widen(params, {"a": "s"}, masks, units, "b", 1, key=KEY), "labels does not have the structure"),
        (
            lambda: widen(params, jax.tree.map(lambda _: 1, params), masks, units, "b", 1, key=KEY),
            "labels hold 1 at 'a/bias'",
        ),
        (lambda: widen(params, "s", {"a": True}, units, "b", 1, key=KEY), "masks does not have the structure"),
        (
            lambda: widen(params, "s", jax.tree.map(lambda _: np.ones(3, bool), params), units, "b", 1, key=KEY),
            "masks have shape",
        ),
        (lambda: insert_layer(*args, "head", key=KEY), "after='head' is the output of the network"),
        (lambda: insert_layer(*args, "x", key=KEY), "layer='x' is not in units"),
        (lambda: insert_layer(*args, "b", key=KEY, name="c"), "name='c' exists"),
        (lambda: insert_layer(*args, "b", key=KEY, density=0.0), "density=0.0"),
        (lambda: add_patches(*args, "input", 1, key=KEY), "layer='input' reads nothing"),
        (lambda: add_patches(*args, "b", 0, key=KEY), "count=0"),
        (lambda: add_patches(*args, "b", 1, key=KEY, hidden=0), "hidden=0"),
        (lambda: apply_patches(params, units, "x", jnp.ones(3), jnp.ones(3)), "layer='x' is not in units"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_name_elsewhere_in_the_tree_is_refused() -> None:
    params = {"net": mlp_params()}
    units = dense_chain(params, [f"net/{name}" for name in MLP])
    with pytest.raises(ValueError, match="name='elsewhere' must stand beside after='net/b'"):
        insert_layer(params, "s", True, units, "net/b", key=KEY, name="elsewhere")
