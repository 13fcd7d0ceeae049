"""The sparse layers, NNX and Linen: what they compute, that they stay sparse, and their masks in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
from flax import linen, nnx

import optax_structure as oxs
from optax_structure import nn

KINDS = ("nnx_linear", "nnx_conv", "linen_dense", "linen_conv")
OPTIMIZERS = {"adam": optax.adam, "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1)}
# Decay moves what has no gradient too: the other optimizer is for the slow tests.
every_pair = pytest.mark.parametrize(
    ("kind", "optimizer"),
    [(kind, "adamw") for kind in KINDS] + [pytest.param(kind, "adam", marks=pytest.mark.slow) for kind in KINDS],
)


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


class Built(NamedTuple):
    """A layer as pure functions: its params, the masks in the same structure, and the two products."""

    params: Any
    masks: Any
    apply: Callable[[Any, Any], jax.Array]
    dense: Callable[[Any, Any], jax.Array]
    """The same product by Flax's own layer, which knows no mask."""
    x: np.ndarray


def build(kind: str, masked_by: Any, density: float = 0.2) -> Built:
    x = inputs(16, 12) if kind in ("nnx_linear", "linen_dense") else inputs(8, 6, 6, 3)
    if kind.startswith("nnx"):
        options: Any = {"density": density, "masked_by": masked_by}
        if kind == "nnx_linear":
            layer: nnx.Module = nn.SparseLinear(12, 5, **options, rngs=nnx.Rngs(0))
            plain: nnx.Module = nnx.Linear(12, 5, rngs=nnx.Rngs(0))
        else:
            layer = nn.SparseConv(3, 5, (3, 3), strides=2, **options, rngs=nnx.Rngs(0))
            plain = nnx.Conv(3, 5, (3, 3), strides=2, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        plain_graph, _ = nnx.split(plain)

        def of(graphdef: Any, *rest: Any) -> Callable[[Any, jax.Array], jax.Array]:
            return lambda params, x: nnx.merge(graphdef, params, *rest)(x)

        return Built(params, nn.masks_of(layer), of(graph, rest), of(plain_graph), x)
    if kind == "linen_dense":
        twin: linen.Module = nn.linen.SparseDense(5, density=density, masked_by=masked_by)
        flat: linen.Module = linen.Dense(5)
    else:
        twin = nn.linen.SparseConv(5, (3, 3), strides=2, density=density, masked_by=masked_by)
        flat = linen.Conv(5, (3, 3), strides=2)
    variables = twin.init(jax.random.key(0), x)
    rest = {} if masked_by == "update" else {"masks": variables["masks"]}
    return Built(
        variables["params"],
        nn.linen.masks_of(variables),
        lambda params, x: twin.apply({"params": params, **rest}, x),
        lambda params, x: flat.apply({"params": params}, x),
        x,
    )


def off_mask(tree: Any, masks: Any) -> jax.Array:
    """All entries that stand off their mask, in one vector (0 for the others)."""
    parts = [
        jnp.where(mask, 0.0, leaf).ravel() if jnp.ndim(mask) else jnp.zeros(1)
        for leaf, mask in zip(jax.tree.leaves(tree), jax.tree.leaves(masks), strict=True)
    ]
    return jnp.concatenate(parts)


def poisoned(params: Any, masks: Any, poison: float) -> Any:
    return jax.tree.map(lambda p, m: jnp.where(m, p, poison) if jnp.ndim(m) else p, params, masks)


def train(built: Built, tx: Any, params: Any, look: Callable[..., Any], steps: int = 40) -> Any:
    """Fit random targets; ``look(params, grads)`` is recorded at every step, after the update."""
    target = inputs(*jax.eval_shape(built.apply, params, built.x).shape)

    def loss(params: Any) -> jax.Array:
        return jnp.mean((built.apply(params, built.x) - target) ** 2)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, look(params, grads))

    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, tx.init(params)))


@every_pair
def test_forward_masked_layer_is_sparse_under_a_bare_optimizer(kind: str, optimizer: str) -> None:
    built = build(kind, "forward")

    def look(params: Any, grads: Any) -> Any:
        y = built.apply(params, built.x)
        sparse = jax.tree.map(lambda p, m: jnp.where(m, p, 0.0), params, built.masks)
        changed = [jnp.any(built.apply(poisoned(params, built.masks, bad), built.x) != y) for bad in (jnp.nan, 1e30)]
        against_flax = jnp.max(jnp.abs(y - built.dense(sparse, built.x)))
        return jnp.stack(changed).any(), against_flax, off_mask(grads, built.masks)

    # Weights off the mask start at 2, not at 0: what decay or momentum does to them must not matter either.
    start = poisoned(built.params, built.masks, 2.0)
    (_, _), (losses, (changed, against_flax, dead_grads)) = train(built, OPTIMIZERS[optimizer](0.02), start, look)
    assert losses[-1] < 0.9 * losses[0]
    assert not changed.any(), "what stands off the mask reached the output"
    np.testing.assert_allclose(against_flax, 0.0, atol=1e-5)
    np.testing.assert_array_equal(dead_grads, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_masked_gradient_is_exact_beside_nan(kind: str) -> None:
    built = build(kind, "forward")

    def loss(params: Any) -> jax.Array:
        return jnp.sum(built.apply(params, built.x) ** 2)

    gradient = jax.jit(jax.grad(loss))
    clean, dirty = gradient(built.params), gradient(poisoned(built.params, built.masks, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    # Eagerly too: under jit XLA makes a select of a product with a converted bool, and would hide NaN * 0.
    dirty_params = poisoned(built.params, built.masks, jnp.nan)
    np.testing.assert_array_equal(built.apply(dirty_params, built.x), built.apply(built.params, built.x))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(clean))


@every_pair
def test_update_masked_layer_is_sparse_under_sparse(kind: str, optimizer: str) -> None:
    built = build(kind, "update")

    def look(params: Any, grads: Any) -> Any:
        return off_mask(params, built.masks), jnp.count_nonzero(off_mask(grads, built.masks))

    off_entries = sum(int((~mask).sum()) for mask in jax.tree.leaves(built.masks) if jnp.ndim(mask))
    tx = OPTIMIZERS[optimizer](0.02)
    (params, _), (losses, (dead, pushing)) = train(built, oxs.sparse(tx, built.masks), built.params, look)
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_array_equal(dead, 0.0)
    np.testing.assert_array_equal(pushing, off_entries)  # the dense gradient did push every one of them, at every step
    np.testing.assert_allclose(built.apply(params, built.x), built.dense(params, built.x), rtol=1e-5, atol=1e-5)
    # Without `sparse` the plain product leaves its mask at once: the test above can fail.
    _, (_, (dead, _)) = train(built, tx, built.params, look, steps=2)
    assert jnp.count_nonzero(dead[-1]) == off_entries


@pytest.mark.parametrize("masked_by", ["forward", "update"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_start_sparse_with_the_exact_count(kind: str, masked_by: str) -> None:
    built = build(kind, masked_by)
    size = 12 * 5 if kind in ("nnx_linear", "linen_dense") else 3 * 3 * 3 * 5
    assert oxs.nonzero(built.masks) == round(0.2 * size)
    np.testing.assert_array_equal(off_mask(built.params, built.masks), 0.0)
    assert sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(built.params)) == round(0.2 * size)
    assert jax.tree.structure(built.masks) == jax.tree.structure(built.params)
    assert jax.tree.map(jnp.ndim, built.masks) == jax.tree.map(lambda p: p.ndim if p.ndim > 1 else 0, built.params)


CONVOLUTIONS = [
    ({"padding": "SAME"}, (2, 7, 7, 4)),
    ({"padding": "VALID", "strides": (2, 1)}, (2, 7, 8, 4)),
    ({"padding": "CIRCULAR", "kernel_dilation": 2}, (2, 7, 7, 4)),
    ({"padding": "REFLECT"}, (2, 7, 7, 4)),
    ({"padding": 1, "input_dilation": 2}, (2, 7, 7, 4)),
    ({"padding": ((1, 0), 2), "feature_group_count": 2}, (2, 7, 7, 4)),
    ({"padding": "SAME"}, (7, 7, 4)),
    ({"padding": "SAME"}, (2, 3, 7, 7, 4)),
    ({"padding": "CAUSAL", "kernel_dilation": 2}, (2, 9, 4)),
]


@pytest.mark.parametrize(("options", "shape"), CONVOLUTIONS)
def test_convolution_equals_flax(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    window = (3,) if options["padding"] == "CAUSAL" else (3, 2)
    x = inputs(*shape)
    kernel_init = jax.nn.initializers.normal()
    plain = nnx.Conv(4, 6, window, **options, kernel_init=kernel_init, rngs=nnx.Rngs(1))
    layer = nn.SparseConv(4, 6, window, **options, kernel_init=kernel_init, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(plain.kernel[...], layer.kernel[...])
    np.testing.assert_allclose(plain(x), layer(x), rtol=1e-6, atol=1e-6)
    twin = nn.linen.SparseConv(6, window, **options)
    variables = {"params": {"kernel": plain.kernel[...], "bias": plain.bias[...]}, "masks": {"kernel": True}}
    np.testing.assert_allclose(plain(x), twin.apply(variables, x), rtol=1e-6, atol=1e-6)


DTYPES = [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (None, jnp.float32)]


@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES)
def test_dtypes_follow_flax(dtype: Any, param_dtype: Any) -> None:
    for x in (jnp.ones((2, 8), jnp.bfloat16), jnp.ones((2, 8), jnp.int32)):
        plain = nnx.Linear(8, 4, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        layer = nn.SparseLinear(8, 4, density=0.5, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        assert layer(x).dtype == plain(x).dtype
        assert layer.kernel[...].dtype == layer.bias[...].dtype == param_dtype
        twin = nn.linen.SparseDense(4, density=0.5, dtype=dtype, param_dtype=param_dtype)
        y, variables = twin.init_with_output(jax.random.key(0), x)
        assert y.dtype == plain(x).dtype and variables["params"]["kernel"].dtype == param_dtype
        assert int(jnp.count_nonzero(layer.kernel[...])) == int(jnp.count_nonzero(variables["params"]["kernel"])) == 16


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_density_outside_its_range_is_refused(density: float) -> None:
    for make in (
        lambda: nn.SparseLinear(4, 4, density=density, rngs=nnx.Rngs(0)),
        lambda: nn.SparseConv(4, 4, 3, density=density, rngs=nnx.Rngs(0)),
        lambda: nn.MLP([4, 4], density=density, rngs=nnx.Rngs(0)),
        lambda: nn.linen.SparseDense(4, density=density),
        lambda: nn.linen.SparseConv(4, 3, density=density),
        lambda: nn.linen.MLP((4, 4), density=density),
    ):
        with pytest.raises(ValueError, match=rf"density={density} must be in \(0, 1\]"):
            make()


def test_other_bad_arguments_are_refused() -> None:
    bad: Any = "backward"
    with pytest.raises(ValueError, match="masked_by='backward' must be 'forward'"):
        nn.SparseLinear(4, 4, masked_by=bad, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="masked_by='backward' must be 'forward'"):
        nn.linen.SparseDense(4, masked_by=bad)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 3\), the kernel \(4, 4\)"):
        nn.SparseLinear(4, 4, mask=jnp.ones((4, 3), bool), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="not both"):
        nn.SparseLinear(4, 4, density=0.5, mask=jnp.ones((4, 4), bool), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="in_features=3 is no multiple of feature_group_count=2"):
        nn.SparseConv(3, 4, 3, feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="3 channels are no multiple of feature_group_count=2"):
        nn.linen.SparseConv(4, 3, feature_group_count=2).init(jax.random.key(0), jnp.ones((1, 5, 3)))
    with pytest.raises(ValueError, match=r"mask gave the shape \(2, 2\) for a kernel of shape \(4, 4\)"):
        nn.linen.SparseDense(4, mask=lambda key, shape: jnp.eye(2)).init(jax.random.key(0), jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="padding='CAUSAL'"):
        nn.SparseConv(4, 4, (3, 3), padding="CAUSAL", rngs=nnx.Rngs(0))(jnp.ones((1, 5, 5, 4)))
    for widths in ([8], [8, 0]):
        with pytest.raises(ValueError, match="must be at least two positive sizes"):
            nn.MLP(widths, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="must be at least two positive sizes"):
            nn.linen.MLP(widths)
    with pytest.raises(ValueError, match="min_fan_in"):  # 2 connections for 20 units
        nn.SparseLinear(10, 20, density=0.01, rngs=nnx.Rngs(0))


def test_no_bias() -> None:
    layer = nn.SparseLinear(4, 3, density=0.5, use_bias=False, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4))
    np.testing.assert_allclose(layer(x), x @ layer.kernel[...], rtol=1e-6)
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == len(jax.tree.leaves(nn.masks_of(layer))) == 1
    variables = nn.linen.SparseDense(3, use_bias=False).init(jax.random.key(0), x)
    assert set(variables["params"]) == {"kernel"}


def mlps() -> list[tuple[tuple[str, ...], Any, Any, Callable[..., jax.Array]]]:
    """(layer names, params, masks, apply) of the MLP of either kind."""
    model = nn.MLP([6, 5, 4, 3], density=0.5, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    twin = nn.linen.MLP((6, 5, 4, 3), density=0.5)
    variables = twin.init(jax.random.key(0), jnp.ones((1, 6)))
    return [
        (model.layer_names, params, nn.masks_of(model), lambda params, x: nnx.merge(graph, params, rest)(x)),
        (
            twin.layer_names,
            variables["params"],
            nn.linen.masks_of(variables),
            lambda params, x: twin.apply({**variables, "params": params}, x),
        ),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_mlp_is_a_chain_with_an_exact_budget(which: int) -> None:
    names, params, masks, apply = mlps()[which]
    assert names == ("hidden_1", "hidden_2", "head")
    assert oxs.nonzero(masks) == round(0.5 * (6 * 5 + 5 * 4 + 4 * 3))
    # ERK: the small head keeps the larger share.
    assert oxs.density(masks["head"]) > oxs.density(masks["hidden_2"]) > oxs.density(masks["hidden_1"])
    x = inputs(3, 6)
    leaf = {name: jnp.asarray(jax.tree.leaves(params[name]["kernel"])[0]) for name in names}
    hidden = np.maximum(np.maximum(np.asarray(x) @ leaf["hidden_1"], 0) @ leaf["hidden_2"], 0)
    np.testing.assert_allclose(apply(params, x), hidden @ leaf["head"], rtol=1e-5, atol=1e-5)  # biases start at 0
    np.testing.assert_array_equal(off_mask(params, masks), 0.0)


def test_mlp_without_sparsity_or_hidden_layers() -> None:
    assert nn.MLP([6, 3], rngs=nnx.Rngs(0)).layer_names == ("head",)
    assert nn.MLP([6, 3], rngs=nnx.Rngs(0), activation=jnp.tanh)(jnp.ones((2, 6))).shape == (2, 3)
    variables = nn.linen.MLP((6, 3)).init(jax.random.key(0), jnp.ones((2, 6)))
    dense = nn.MLP([6, 3], rngs=nnx.Rngs(0))
    assert oxs.density(nn.linen.masks_of(variables)) == oxs.density(nn.masks_of(dense)) == 1.0


def test_flatten() -> None:
    mlp = nn.MLP([6, 5, 4], density=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(inputs(3, 1, 3, 2))
    np.testing.assert_array_equal(nn.Flatten(mlp)(x), mlp(x.reshape(3, 6)))
    chain = nnx.Sequential(nn.Flatten(), mlp)
    np.testing.assert_array_equal(chain(x), mlp(x.reshape(3, 6)))
    assert oxs.nonzero(nn.masks_of(nn.Flatten(mlp))) == oxs.nonzero(nn.masks_of(mlp))


def test_masks_go_out_through_sparse_and_come_back() -> None:
    model = nnx.Sequential(nn.SparseConv(3, 5, (3, 3), density=0.2, masked_by="update", rngs=nnx.Rngs(0)), nn.Flatten())
    masks = nn.masks_of(model)
    params = nnx.state(model, nnx.Param)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    state = oxs.sparse(optax.adam(1e-3), masks).init(params)
    moved = jax.tree.map(lambda m: jnp.roll(m, 1) if m.ndim else m, oxs.get_masks(state))
    nnx.update(model, jax.tree.map(jnp.ones_like, params))
    nn.set_masks(model, moved)
    jax.tree.map(np.testing.assert_array_equal, nn.masks_of(model), moved)
    kernel, mask = model.layers[0].kernel[...], model.layers[0].kernel_mask[...]
    np.testing.assert_array_equal(kernel, mask.astype(jnp.float32))  # ones on the new mask, exactly 0 off it
    np.testing.assert_array_equal(model.layers[0].bias[...], 1.0)


def test_linen_masks_come_back_as_the_collection() -> None:
    twin = nn.linen.MLP((6, 5, 4), density=0.5)
    variables = twin.init(jax.random.key(0), jnp.ones((1, 6)))
    state = oxs.sparse(optax.adam(1e-3), nn.linen.masks_of(variables)).init(variables["params"])
    x = inputs(2, 6)
    back = {"params": variables["params"], "masks": oxs.get_masks(state)}
    np.testing.assert_array_equal(twin.apply(back, x), twin.apply(variables, x))
    # and they are read: without a single connection there is no output
    none = jax.tree.map(jnp.zeros_like, back["masks"])
    np.testing.assert_array_equal(twin.apply({**back, "masks": none}, x), 0.0)


def test_masks_are_out_of_sight_of_gradients_and_optimizers() -> None:
    model = nn.MLP([6, 5, 4], density=0.5, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nn.masks_of(model))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: nn.MLP, optimizer: nnx.Optimizer, x: jax.Array) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    for _ in range(3):
        step(model, optimizer, jnp.ones((2, 6)))
    jax.tree.map(np.testing.assert_array_equal, nn.masks_of(model), before)
    np.testing.assert_array_equal(off_mask(nnx.state(model, nnx.Param), before), 0.0)


def test_masks_that_do_not_fit_are_refused() -> None:
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nn.SparseLinear(4, 2, density=0.5, rngs=nnx.Rngs(0)))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    true = jax.tree.map(lambda leaf: jnp.asarray(True), nnx.state(model, nnx.Param))
    params = nnx.state(model, nnx.Param)
    everywhere = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool) if leaf.ndim > 1 else True, params)
    with pytest.raises(ValueError, match="'layers/0/kernel' has a mask, the model none"):
        nn.set_masks(model, everywhere)
    true["layers"][1]["kernel"] = true["layers"][1]["kernel"].replace(jnp.ones((4, 3), bool))
    with pytest.raises(ValueError, match=r"'layers/1/kernel' has shape \(4, 3\), its parameter \(4, 2\)"):
        nn.set_masks(model, true)
    with pytest.raises(ValueError, match="masks"):
        nn.set_masks(model, {"layers": {"0": True}})
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_vmap_over_seeds() -> None:
    def logits(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nn.MLP([6, 5, 4], density=0.5, rngs=nnx.Rngs(key))
        return model(jnp.ones((2, 6))), model.hidden_1.kernel_mask[...]

    keys = jax.random.split(jax.random.key(0), 3)
    batched, masks = jax.vmap(logits)(keys)
    np.testing.assert_allclose(batched, jnp.stack([logits(key)[0] for key in keys]), rtol=1e-5, atol=1e-6)
    assert not (masks[0] == masks[1]).all()
    twin = nn.linen.MLP((6, 5, 4), density=0.5)
    variables = jax.vmap(lambda key: twin.init(key, jnp.ones((2, 6))))(keys)
    assert jax.vmap(lambda v: twin.apply(v, jnp.ones((2, 6))))(variables).shape == (3, 2, 4)


def test_vmapped_examples_equal_the_batch() -> None:
    built = build("nnx_conv", "forward")
    one_by_one = jax.vmap(lambda x: built.apply(built.params, x))(built.x)
    np.testing.assert_allclose(one_by_one, built.apply(built.params, built.x), rtol=1e-5, atol=1e-6)


def test_orbax_restores_params_and_masks(tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    model = nn.Flatten(nn.MLP([6, 5, 4], density=0.5, rngs=nnx.Rngs(0)))
    twin = nn.linen.MLP((6, 5, 4), density=0.5).init(jax.random.key(0), jnp.ones((1, 6)))
    saved = {"nnx": nnx.state(model), "masks": nn.masks_of(model), "linen": twin, "of": nn.linen.masks_of(twin)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", saved)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "model", jax.tree.map(jnp.zeros_like, saved))
    assert jax.tree.structure(back) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, back, saved)
