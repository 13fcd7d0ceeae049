"""Ablation of units that lost their connections: what goes, what stays, where constants end, what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_structure as oxs
from optax_structure._tree import leaves_by_path, map_with_path
from optax_structure.growth import ablate_units, ablation, add_connections, add_patches
from optax_structure.structure import UnitAxis, UnitGroup, Units, dense_chain

KEY = jax.random.key(0)
MLP = ("a", "b", "c", "head")
CNN = ("conv_1", "conv_2", "dense", "head")
SHAPES = {
    "mlp": {"a": (6, 7), "b": (7, 6), "c": (6, 5), "head": (5, 3)},
    "cnn": {"conv_1": (3, 3, 2, 4), "conv_2": (3, 3, 4, 5), "dense": (3 * 4 * 5, 6), "head": (6, 3)},
}


def net(kind: str, density: float, seed: int, bias: float = 0.5) -> tuple[Any, Any, Units, np.ndarray]:
    """Weights off the masks are 0; biases have both signs unless ``bias`` is 0; an input to try it on."""
    rng = np.random.default_rng(seed)
    params, masks = {}, {}
    for name, shape in SHAPES[kind].items():
        mask = rng.random(shape) < density
        kernel = np.where(mask, rng.normal(size=shape), 0).astype(np.float32)
        params[name] = {"kernel": kernel, "bias": (bias * rng.normal(size=shape[-1])).astype(np.float32)}
        masks[name] = {"kernel": mask, "bias": True}
    units = dense_chain(params, list(SHAPES[kind]))
    return params, masks, units, rng.normal(size=(8, 6) if kind == "mlp" else (2, 3, 4, 2))


def living(params: Any, masks: Any) -> Any:
    """Params with weights of 0 off the masks; NumPy, which compiles nothing."""
    return jax.tree.map(lambda leaf, mask: np.where(mask, leaf, 0).astype(leaf.dtype), params, masks)


def forward(params: Any, x: np.ndarray, act: Any) -> np.ndarray:
    """The network in float64 and NumPy; convolutions of 3 x 3 with padding SAME, stride 1."""
    *hidden, last = params
    for name in (*hidden, last):
        kernel, bias = (np.asarray(params[name][leaf], np.float64) for leaf in ("kernel", "bias"))
        if kernel.ndim == 4:
            height, width = x.shape[1:3]
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            taps = [(i, j) for i in range(3) for j in range(3)]
            x = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in taps) + bias
        else:
            x = x.reshape(len(x), -1) @ kernel + bias
        x = x if name == last else act(x)
    return x


def relu(x: Any) -> Any:
    return np.maximum(x, 0)


def one_by_one(params: Any, masks: Any, act: Any) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """A second implementation: one unit of a chain of dense layers at a time, in the order in which it is found."""
    weights, biases = (
        [np.asarray(layer[leaf], np.float64).copy() for layer in params.values()] for leaf in ("kernel", "bias")
    )
    exists = [np.asarray(layer["kernel"]).copy() for layer in masks.values()]
    again = True
    while again:
        again = False
        for layer in range(len(exists) - 1):
            for unit in range(exists[layer].shape[1]):
                fed, read = exists[layer][:, unit].any(), exists[layer + 1][unit].any()
                if read and not fed:
                    for target in np.flatnonzero(exists[layer + 1][unit]):
                        constant = 0.0 if act is None else float(act(biases[layer][unit]))
                        biases[layer + 1][target] += constant * weights[layer + 1][unit, target]
                if read != fed:
                    again = True
                    exists[layer][:, unit] = exists[layer + 1][unit] = False
                    weights[layer][:, unit] = weights[layer + 1][unit] = 0.0
    for layer in range(len(exists) - 1):
        biases[layer][~exists[layer].any(0)] = 0.0
    return weights, biases, exists


def halves(masks: Any, kind: str) -> int:
    """How many hidden units of a chain are connected on one side only."""
    kernels = [np.asarray(masks[name]["kernel"]) for name in SHAPES[kind]]
    number = 0
    for made, read in itertools.pairwise(kernels):
        size = made.shape[-1]
        into = made.reshape(-1, size).any(0)
        out = np.moveaxis(read, -2, 0).reshape(-1, size, read.size // read.shape[-2]).any((0, 2))
        number += int((into != out).sum())
    return number


def check_edit(before: Any, old_masks: Any, grown: Any) -> None:
    """Nothing but masks, what they lost, and biases has changed; the record is that of an edit of masks."""
    for path, leaf in leaves_by_path(grown.params).items():
        old, mask = (np.asarray(leaves_by_path(tree)[path]) for tree in (before, old_masks))
        new = np.asarray(leaves_by_path(grown.masks)[path])
        assert leaf.shape == old.shape and leaf.dtype == old.dtype
        if mask.ndim:
            assert new.dtype == bool and not (new & ~mask).any()
            np.testing.assert_array_equal(leaf, np.where(new, old, 0))
        assert leaves_by_path(grown.born)[path] == 255
        assert [index.tolist() for index in grown.sources[path]] == [list(range(size)) for size in leaf.shape]
    assert grown.rename == {} and jax.tree.structure(grown.masks) == jax.tree.structure(before)


# By hand -------------------------------------------------------------------------------------------------------------


def by_hand() -> tuple[Any, Any, Units]:
    """2-3-3-2. Unit 1 of ``a`` has no input, and then unit 1 of ``b`` has none; unit 2 of ``b`` and then of ``a`` has
    no reader; the units 0 stay."""
    kernels = {
        "a": [[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]],
        "b": [[5.0, 0.0, 0.0], [6.0, 7.0, 0.0], [0.0, 0.0, 8.0]],
        "head": [[9.0, 1.0], [2.0, 0.0], [0.0, 0.0]],
    }
    biases = {"a": [0.25, 0.5, 1.0], "b": [0.0, -1.0, 1.0], "head": [0.0, 1.0]}
    params = {n: {"kernel": np.float32(kernels[n]), "bias": np.float32(biases[n])} for n in kernels}
    masks = map_with_path(lambda path, leaf: leaf != 0 if "kernel" in path else True, params)
    return params, masks, dense_chain(params, list(kernels))


@pytest.mark.parametrize("activation", [jax.nn.relu, None])
def test_both_cascades_by_hand(activation: Any) -> None:
    params, masks, units = by_hand()
    labels = map_with_path(lambda path, _: path.split("/")[0], params)
    grown = ablate_units(params, labels, masks, units, activation=activation)
    check_edit(params, masks, grown)
    assert grown.labels == labels and grown.units is units
    # Left: two into unit 0 of a, one from it to unit 0 of b, two from that to the head.
    kept = {"a": [[1.0, 0, 0], [3.0, 0, 0]], "b": [[5.0, 0, 0], [0] * 3, [0] * 3], "head": [[9.0, 1.0], [0, 0], [0, 0]]}
    for name, kernel in kept.items():
        np.testing.assert_array_equal(grown.params[name]["kernel"], kernel)
        np.testing.assert_array_equal(grown.masks[name]["kernel"], np.array(kernel) != 0)
    assert oxs.nonzero(masks) == 11 and oxs.nonzero(grown.masks) == 5
    np.testing.assert_array_equal(grown.params["a"]["bias"], [0.25, 0, 0])
    # Unit 1 of a is relu(0.5): 0.5 * 6 for unit 0 of b, 0.5 * 7 for its unit 1, so relu(-1 + 3.5) * 2 = 5 for the head.
    folded = activation is not None
    np.testing.assert_array_equal(grown.params["b"]["bias"], [3.0 if folded else 0.0, 0, 0])
    np.testing.assert_array_equal(grown.params["head"]["bias"], [5.0 if folded else 0.0, 1.0])


def test_nothing_to_ablate_changes_nothing() -> None:
    params, masks, units, _ = net("mlp", 1.0, 0)
    grown = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    for new, old in ((grown.params, params), (grown.masks, masks)):
        jax.tree.map(np.testing.assert_array_equal, new, old)


def test_an_input_feature_and_an_output_are_no_units() -> None:
    params, masks, units, _ = net("mlp", 1.0, 0)
    masks["a"]["kernel"][0] = False  # nobody reads feature 0
    masks["head"]["kernel"][:, 0] = False  # output 0 reads nothing
    params = living(params, masks)
    grown = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    jax.tree.map(np.testing.assert_array_equal, grown.params, params)
    assert oxs.nonzero(grown.masks) == oxs.nonzero(masks)


def test_a_layer_without_readers_takes_everything_with_it() -> None:
    params, masks, units, x = net("mlp", 1.0, 1)
    masks["c"]["kernel"][:] = False
    params = living(params, masks)
    grown = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    assert oxs.nonzero(grown.masks) == 0
    np.testing.assert_allclose(grown.params["head"]["bias"], forward(params, x, relu)[0], rtol=1e-5)
    for name in "abc":
        assert not np.any(grown.params[name]["bias"])


# Against the second implementation -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.03, 0.6))
def test_random_masks(seed: int, density: float) -> None:
    params, masks, units, x = net("mlp", density, seed)
    for activation, act in ((jax.nn.relu, relu), (None, None)):
        grown = ablate_units(params, "scaffold", masks, units, activation=activation)
        check_edit(params, masks, grown)
        assert halves(grown.masks, "mlp") == 0
        weights, biases, exists = one_by_one(params, masks, act)
        assert oxs.nonzero(grown.masks) == sum(int(mask.sum()) for mask in exists)
        for name, weight, bias, mask in zip(MLP, weights, biases, exists, strict=True):
            np.testing.assert_array_equal(grown.masks[name]["kernel"], mask)
            np.testing.assert_array_equal(grown.params[name]["kernel"], weight)
            np.testing.assert_allclose(grown.params[name]["bias"], bias, rtol=1e-5, atol=1e-6)
        if act is not None:
            np.testing.assert_allclose(forward(grown.params, x, act), forward(params, x, act), rtol=1e-5, atol=1e-5)
    again = ablate_units(*grown[:4], activation=jax.nn.relu)
    jax.tree.map(np.testing.assert_array_equal, again.params, grown.params)


def test_random_masks_lose_units_at_all() -> None:
    """What the property above compares is not mostly empty or full."""
    lost = []
    for seed in range(20):
        params, masks, units, _ = net("mlp", 0.15, seed)
        lost.append(oxs.nonzero(masks) - oxs.nonzero(ablate_units(params, "s", masks, units).masks))
    assert sum(number > 0 for number in lost) > 10 and len(set(lost)) > 5


@pytest.mark.parametrize(("activation", "bias"), [(jax.nn.sigmoid, True), (jnp.cos, False)])
def test_any_activation_folds_and_a_missing_bias_is_zero(activation: Any, bias: bool) -> None:
    params, masks, units, x = net("mlp", 0.3, 3)
    masks["b"]["kernel"][:, :2] = False
    masks["c"]["kernel"][0] = True
    params = living(params, masks)
    params["c"]["kernel"][0] = 1.5
    if not bias:
        del params["b"]["bias"], masks["b"]["bias"]
        units = dense_chain(params, list(MLP))
    grown = ablate_units(params, "scaffold", masks, units, activation=activation)
    assert oxs.nonzero(grown.masks) < oxs.nonzero(masks)
    assert not np.array_equal(grown.params["c"]["bias"], params["c"]["bias"])

    def out(tree: Any) -> np.ndarray:
        whole = {**tree, "b": {"bias": np.zeros(6), **tree["b"]}}
        return forward(whole, x, lambda values: np.asarray(activation(values.astype(np.float32)), np.float64))

    np.testing.assert_allclose(out(grown.params), out(params), rtol=1e-4, atol=1e-4)


def test_without_activation_nothing_changes_for_relu_and_no_bias() -> None:
    params, masks, units, x = net("cnn", 0.05, 4, bias=0.0)
    grown = ablate_units(params, "scaffold", masks, units)
    assert halves(masks, "cnn") > 0 and halves(grown.masks, "cnn") == 0
    np.testing.assert_array_equal(forward(grown.params, x, relu), forward(params, x, relu))
    assert not any(np.any(layer["bias"]) for layer in grown.params.values())
    # The constants are 0 here, so that the convolution which could not take them does not matter.
    folded = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    jax.tree.map(np.testing.assert_array_equal, folded.params, grown.params)


# Convolutions, normalisation, residual branches, dense leaves, patches -----------------------------------------------


def starved_cnn() -> tuple[Any, Any, Units, np.ndarray]:
    """Channel 1 of ``conv_2`` has no input; channel 0 of ``conv_1`` is read by it alone. All else is connected."""
    params, masks, units, x = net("cnn", 1.0, 5)
    masks["conv_2"]["kernel"][:, :, 0] = False
    masks["conv_2"]["kernel"][..., 1] = False
    params["conv_2"]["bias"][1] = 0.75
    return living(params, masks), masks, units, x


def test_a_channel_before_a_flatten_goes_at_every_position() -> None:
    params, masks, units, x = starved_cnn()
    grown = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    check_edit(params, masks, grown)
    np.testing.assert_allclose(forward(grown.params, x, relu), forward(params, x, relu), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(grown.masks["conv_1"]["kernel"]).any((0, 1, 2)), [False, True, True, True])
    rows = np.asarray(grown.masks["dense"]["kernel"]).reshape(12, 5, 6)
    assert rows[:, [0, 2, 3, 4]].all() and not rows[:, 1].any()
    carried = 0.75 * np.asarray(params["dense"]["kernel"]).reshape(12, 5, 6)[:, 1].sum(0)
    np.testing.assert_allclose(grown.params["dense"]["bias"], params["dense"]["bias"] + carried, rtol=1e-4)
    assert grown.params["conv_1"]["bias"][0] == 0 and grown.params["conv_2"]["bias"][1] == 0
    freed = 9 * 2 + 12 * 6  # conv_1 into channel 0, the flattened channel 1; conv_2 had lost its part already
    assert oxs.nonzero(masks) - oxs.nonzero(grown.masks) == freed


def test_constants_that_no_bias_can_take_are_refused() -> None:
    params, masks, units, _ = net("cnn", 1.0, 6)
    masks["conv_1"]["kernel"][..., 2] = False
    params = living(params, masks)
    params["conv_1"]["bias"][2] = 0.5
    fix = "Pass activation=None"
    with pytest.raises(ValueError, match=rf"'conv_1' without an input.*'conv_2/kernel'.*pads with 0.*{fix}"):
        ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    assert oxs.nonzero(ablate_units(params, "scaffold", masks, units).masks) == oxs.nonzero(masks) - 9 * 5
    # With a negative bias the ReLU gives 0, and nothing stands in the way.
    params["conv_1"]["bias"][2] = -0.5
    ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)

    params, masks, _, _ = starved_cnn()
    without = {**params, "dense": {"kernel": params["dense"]["kernel"]}}
    sparse = {**masks, "dense": {"kernel": masks["dense"]["kernel"]}}
    with pytest.raises(ValueError, match=rf"'conv_2'.*'dense/kernel'.*no bias beside it.*{fix}"):
        ablate_units(without, "scaffold", sparse, dense_chain(without, list(CNN)), activation=jax.nn.relu)
    masked_bias = {**masks, "dense": {**masks["dense"], "bias": np.ones(6, bool)}}
    with pytest.raises(ValueError, match="without mask"):
        ablate_units(params, "scaffold", masked_bias, dense_chain(params, list(CNN)), activation=jax.nn.relu)

    normed = {**params, "bn": {"scale": np.ones(5), "bias": np.ones(5)}}
    units = dense_chain(normed, list(CNN), norms={"conv_2": "bn"})
    masks = {**masks, "bn": {"scale": True, "bias": True}}
    with pytest.raises(ValueError, match=rf"'conv_2'.*'dense/kernel'.*not known behind.*'bn/scale'.*{fix}"):
        ablate_units(normed, "scaffold", masks, units, activation=jax.nn.relu)
    grown = ablate_units(normed, "scaffold", masks, units)
    np.testing.assert_array_equal(grown.params["bn"]["bias"], [1, 0, 1, 1, 1])
    np.testing.assert_array_equal(grown.params["bn"]["scale"], 1)


def test_what_nobody_reads_in_the_end_needs_no_bias() -> None:
    params, masks, units, _ = net("cnn", 1.0, 7)
    params["conv_1"]["bias"][2] = 0.5
    masks["conv_1"]["kernel"][..., 2] = False
    masks["conv_2"]["kernel"][:, :, 2] = np.arange(5) == 3  # it feeds channel 3 alone, and this
    masks["dense"]["kernel"].reshape(12, 5, 6)[:, 3] = False  # feeds nothing
    grown = ablate_units(living(params, masks), "scaffold", masks, units, activation=jax.nn.relu)
    assert not grown.masks["conv_2"]["kernel"][..., 3].any() and halves(grown.masks, "cnn") == 0


def test_a_kernel_of_one_pixel_takes_a_constant() -> None:
    params = {
        "a": {"kernel": np.ones((3, 3, 1, 2)), "bias": np.array([1.0, 2.0])},
        "b": {"kernel": np.array([[[[1.0, 0.0], [3.0, 4.0]]]]), "bias": np.zeros(2)},
        "head": {"kernel": np.ones((2, 1)), "bias": np.zeros(1)},
    }
    masks = map_with_path(lambda path, leaf: leaf != 0 if "kernel" in path else True, params)
    masks["a"]["kernel"][..., 1] = False
    units = dense_chain(params, ["a", "b", "head"])
    grown = ablate_units(living(params, masks), "scaffold", masks, units, activation=jax.nn.relu)
    # Unit 1 of a was relu(2): 2 * 3 and 2 * 4; unit 1 of b read it alone, so it was relu(8), which the head takes.
    np.testing.assert_array_equal(grown.params["b"]["bias"], [6.0, 0.0])
    np.testing.assert_array_equal(grown.params["head"]["bias"], [8.0])


def residual(first: Any, last: Any) -> tuple[Any, Any, Units]:
    """A stream of three units that ``stem`` and ``up`` write and ``down`` and ``head`` read, and the masks of two."""
    shapes = {"stem": (2, 3), "down": (3, 2), "up": (2, 3), "head": (3, 2)}
    masks = {name: np.ones(shape, bool) for name, shape in shapes.items()}
    masks |= {"stem": masks["stem"] & np.array(first), "up": masks["up"] & np.array(last)}
    params = {
        name: {"kernel": np.float32(mask), "bias": np.ones(mask.shape[1], np.float32)} for name, mask in masks.items()
    }

    def group(layer: str, made: list[str], read: list[str]) -> UnitGroup:
        axes = [UnitAxis(f"{name}/kernel", 1, "incoming") for name in made]
        axes += [UnitAxis(f"{name}/bias", 0, "bias") for name in made]
        axes += [UnitAxis(f"{name}/kernel", 0, "outgoing") for name in read]
        return UnitGroup(layer, shapes[(made or read)[0]][1 if made else 0], tuple(axes))

    groups = group("input", [], ["stem"]), group("stream", ["stem", "up"], ["down", "head"])
    groups += group("down", ["down"], ["up"]), group("head", ["head"], [])
    return params, {name: {"kernel": mask, "bias": True} for name, mask in masks.items()}, Units(groups)


def test_units_of_a_residual_stream_live_while_any_kernel_writes_and_any_reads_them() -> None:
    params, masks, units = residual([False, True, False], [True, False, False])
    grown = ablate_units(params, "scaffold", masks, units)
    check_edit(params, masks, grown)
    # Units 0 and 1 have one writer each; unit 2 has none, and both of its readers let go of it.
    for name in ("down", "head"):
        np.testing.assert_array_equal(grown.masks[name]["kernel"], [[True, True], [True, True], [False, False]])
    for name in ("stem", "up"):
        np.testing.assert_array_equal(grown.masks[name]["kernel"], masks[name]["kernel"])
        np.testing.assert_array_equal(grown.params[name]["bias"], [1, 1, 0])
    with pytest.raises(ValueError, match=r"'stream'.*not known behind \['stem/kernel', 'up/kernel'\]"):
        ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)


def test_leaves_without_a_mask_keep_their_connections() -> None:
    params, masks, units, x = net("mlp", 1.0, 8)
    masks["c"]["kernel"][:, 1] = False
    masks["c"]["kernel"][2] = False
    masks["b"]["kernel"][:, 4] = False
    params = living(params, masks)
    masks["head"]["kernel"] = True
    grown = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    assert grown.masks["head"]["kernel"] is True
    np.testing.assert_array_equal(grown.params["head"]["kernel"], params["head"]["kernel"])
    # Unit 1 of c is a constant that the head reads, as it reads every unit: it keeps its bias and what that does.
    assert grown.params["c"]["bias"][1] == params["c"]["bias"][1] != 0
    np.testing.assert_allclose(forward(grown.params, x, relu), forward(params, x, relu), rtol=1e-5, atol=1e-5)
    # Gone: units 2 (unread) and 4 (unfed) of b, 7 inputs of the one, the 4 readers of the other.
    assert oxs.nonzero(masks) - oxs.nonzero(grown.masks) == 7 + 4


def test_a_patch_writes_and_reads() -> None:
    params, masks, units, _ = net("mlp", 1.0, 9)
    masks["b"]["kernel"][:, :3] = False
    masks["c"]["kernel"][3:] = False
    params = living(params, masks)
    one, two = (ablate_units(params, "scaffold", masks, units), add_patches(params, "s", masks, units, "b", 1, key=KEY))
    assert not one.masks["c"]["kernel"][:3].any() and not one.masks["b"]["kernel"][:, 3:].any()
    assert set(two.units.patches[0].writes) == set(range(6))  # all units of b have an input now
    grown = ablate_units(*two[:4])
    assert grown.masks["c"]["kernel"][:3].all() and not grown.masks["b"]["kernel"][:, 3:].any()
    two = add_patches(params, "s", masks, units, "c", 1, key=KEY)  # and here a reader
    grown = ablate_units(*two[:4])
    assert not grown.masks["c"]["kernel"][:3].any() and grown.masks["b"]["kernel"][:, 3:].all()
    assert all(grown.masks["patch_0"]["up"].values())


def test_a_patch_behind_a_flatten_reads_channels() -> None:
    params, masks, units, _ = net("cnn", 1.0, 12)
    masks["dense"]["kernel"][:] = False
    two = add_patches(living(params, masks), "s", masks, units, "dense", 1, key=KEY, size=2)
    read = {position % 5 for position in two.units.patches[0].reads}
    kept = np.asarray(ablate_units(*two[:4]).masks["conv_2"]["kernel"]).any((0, 1, 2))
    assert set(np.flatnonzero(kept)) == read and max(two.units.patches[0].reads) > 5


def test_the_input_is_no_layer_even_where_a_branch_is_added_to_it() -> None:
    masks = {"a": {"kernel": np.array([[False, True], [False, False]])}}
    axes = (UnitAxis("a/kernel", 0, "outgoing"), UnitAxis("a/kernel", 1, "incoming"))
    units = Units((UnitGroup("input", 2, axes),))
    params = {"a": {"kernel": np.ones((2, 2), np.float32)}}
    grown = ablate_units(living(params, masks), "scaffold", masks, units)
    np.testing.assert_array_equal(grown.masks["a"]["kernel"], masks["a"]["kernel"])


# With the optimizer --------------------------------------------------------------------------------------------------


def test_transfer_state_keeps_the_moments_of_the_others_bit_for_bit() -> None:
    params, masks, units, _ = net("mlp", 0.3, 10)
    params = jax.tree.map(jnp.asarray, params)
    tx = oxs.sparse(optax.scale_by_adam(), masks)
    update, rng = jax.jit(tx.update), np.random.default_rng(1)
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    _, state = update(grads, jax.jit(tx.init)(params), params)
    grown = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    after = oxs.transfer_state(tx, state, params, tx, grown.params, growth=grown)
    jax.tree.map(np.testing.assert_array_equal, oxs.get_masks(after), grown.masks)
    lost = 0
    for name in MLP:
        gone = masks[name]["kernel"] & ~np.asarray(grown.masks[name]["kernel"])
        lost += gone.sum()
        for field in ("mu", "nu"):
            old, new = (getattr(tree.inner_state, field)[name] for tree in (state, after))
            assert np.all(np.asarray(old["kernel"])[gone] != 0)
            np.testing.assert_array_equal(new["kernel"], np.where(gone, 0, old["kernel"]))
            np.testing.assert_array_equal(new["bias"], old["bias"])
    assert lost > 0
    jax.tree.map(np.testing.assert_array_equal, after.inner_state.count, state.inner_state.count)
    updates, _ = update(grads, after, grown.params)
    assert update._cache_size() == 1
    stepped = optax.apply_updates(grown.params, updates)
    assert all(not np.any(np.asarray(stepped[n]["kernel"])[~np.asarray(grown.masks[n]["kernel"])]) for n in MLP)


@pytest.mark.slow
def test_set_at_a_low_density_frees_what_it_wastes() -> None:
    sizes = {"a": (12, 40), "b": (40, 40), "head": (40, 3)}
    like = {name: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])} for name, shape in sizes.items()}
    masks = oxs.random_masks(KEY, like, 0.02, min_fan_in=0)
    draw = lambda path, leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) * (leaf.ndim > 1)  # noqa: E731
    params = oxs.apply_masks(map_with_path(draw, like), masks)
    units = dense_chain(params, list(sizes))
    tx = oxs.sparse(oxs.per_leaf(optax.adam(1e-2)), masks, rewire=oxs.set_rewiring(every=5))
    x = jax.random.normal(KEY, (64, 12))

    def loss(params: Any) -> jax.Array:
        hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        hidden = jax.nn.relu(hidden @ params["b"]["kernel"] + params["b"]["bias"])
        return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - x[:, :3] ** 2) ** 2)

    @jax.jit
    def train(params: Any, state: Any) -> tuple[Any, Any]:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=50)[0]

    params, state = train(params, tx.init(params))
    masks = oxs.get_masks(state)
    labels = jax.tree.map(lambda _: "scaffold", params)
    grown = ablate_units(params, labels, masks, units, activation=jax.nn.relu)
    check_edit(params, masks, grown)
    _, _, exists = one_by_one(params, masks, relu)
    before, after = oxs.nonzero(masks), oxs.nonzero(grown.masks)
    assert 0 < after == sum(int(mask.sum()) for mask in exists) < before
    np.testing.assert_allclose(loss(grown.params), loss(params), rtol=1e-4)
    state = oxs.transfer_state(tx, state, params, tx, grown.params, growth=grown)
    spent = add_connections(*grown[:4], before - after, key=KEY, init="fan_in")
    state = oxs.transfer_state(tx, state, grown.params, tx, spent.params, growth=spent)
    params, state = train(spent.params, state)
    assert oxs.nonzero(oxs.get_masks(state)) == before and train._cache_size() == 1 and np.isfinite(loss(params))


# Compilation, dtypes, errors -----------------------------------------------------------------------------------------


def test_other_masks_run_the_same_program() -> None:
    params, masks, units, _ = net("mlp", 0.3, 11)
    ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    size = ablation._ablate._cache_size()
    for density in (0.1, 0.6, 1.0):
        params, masks, _, _ = net("mlp", density, 12)
        ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    assert ablation._ablate._cache_size() == size


def test_bfloat16_stays_and_is_summed_in_float32() -> None:
    # relu(1 + 2**-7) * (1 + 2**-7) - relu(1 + 2**-6) * 1 = 2**-14; the first product alone rounds to 1 + 2**-6.
    near = 1 + 2**-7
    params = {
        "a": {"kernel": np.zeros((1, 2)), "bias": np.array([near, 1 + 2**-6])},
        "head": {"kernel": np.array([[near], [-1.0]]), "bias": np.zeros(1)},
    }
    params = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), params)
    masks = {
        "a": {"kernel": np.zeros((1, 2), bool), "bias": True},
        "head": {"kernel": np.ones((2, 1), bool), "bias": True},
    }
    grown = ablate_units(params, "scaffold", masks, dense_chain(params, ["a", "head"]), activation=jax.nn.relu)
    check_edit(params, masks, grown)
    assert float(grown.params["head"]["bias"][0]) == 2**-14


def test_weights_off_the_masks_carry_nothing_and_stay() -> None:
    masked, masks, units, _ = net("mlp", 0.2, 13)
    params = jax.tree.map(lambda leaf, mask: np.where(mask, leaf, np.float32(7)), masked, masks)
    one, two = (ablate_units(p, "s", masks, units, activation=jax.nn.relu) for p in (params, masked))
    for name in MLP:
        np.testing.assert_array_equal(one.params[name]["bias"], two.params[name]["bias"])
        expected = np.where(masks[name]["kernel"], two.params[name]["kernel"], 7)
        np.testing.assert_array_equal(one.params[name]["kernel"], expected)


def test_inside_jit_it_does_the_same() -> None:
    params, masks, units, _ = net("mlp", 0.2, 14)
    masks = jax.tree.map(np.asarray, masks)

    @jax.jit
    def inside(params: Any, masks: Any) -> Any:
        return ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)[0:3:2]

    grown = ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
    for one, two in zip(inside(params, masks), (grown.params, grown.masks), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, r"activation='relu' must be a function"),
        ({"masks": True}, "no leaf is sparse"),
        ({"masks": {"a": True}}, r"masks does not have the structure of params.*'head'"),
        ({"labels": 3}, r"labels hold 3 at 'a/bias'"),
        ({"units": dense_chain(by_hand()[0], ["a", "b", "head"])}, r"units do not fit.*'a/kernel'.*\(6, 7\).*1 x 2"),
        ({"units": Units((UnitGroup("q", 2, (UnitAxis("q/w", 0, "bias"),)),))}, r"units do not fit.*'q/w'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    params, masks, units, _ = net("mlp", 0.5, 0)
    arguments = {"labels": "scaffold", "masks": masks, "units": units, **change}
    with pytest.raises(ValueError, match=message):
        ablate_units(params, **arguments)
