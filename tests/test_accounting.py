"""Accounting: every number by a formula worked by hand, the sums against XLA's own analysis of the compiled step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_structure._tree import map_with_path
from optax_structure.accounting import Count, Counts, count
from optax_structure.sparsity.masks import nonzero, random_masks

KEY = jax.random.key(0)


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def flops(counts: Counts, label: str | None = None) -> tuple[int, int]:
    """Forward and training FLOPs of a label, of the other products, or of all."""
    row = counts.total if label is None else counts.other if label == "other" else counts.labels[label]
    return row.forward_flops, row.training_flops


def by_path(apply: Callable[..., Any], params: Any, *example: Any, masks: Any = True) -> Counts:
    """Counts with a row for every leaf."""
    return count(apply, params, masks, *example, labels=map_with_path(lambda path, leaf: path, params))


MLP = {
    "hidden": {"kernel": jnp.ones((7, 5)), "bias": jnp.ones(5)},
    "head": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)},
}


def mlp(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def test_an_mlp_by_hand() -> None:
    masks = {
        "hidden": {"kernel": jnp.arange(35).reshape(7, 5) < 14, "bias": jnp.asarray(True)},
        "head": {"kernel": jnp.arange(15).reshape(5, 3) < 9, "bias": jnp.asarray(True)},
    }
    counts = count(mlp, MLP, masks, array(11, 7), labels={"hidden": "scaffold", "head": "new"})
    # 11 rows, 2 a multiply-add. The hidden layer's input needs no gradient: two products for it, three for the head.
    assert counts.labels["scaffold"] == ("scaffold", 40, 19, 35, 14, 770, 1540, 308, 616)
    assert counts.labels["new"] == ("new", 18, 12, 15, 9, 330, 990, 198, 594)
    assert counts.other == ("other", 0, 0, 0, 0, 0, 0, 0, 0)
    assert counts.total == ("all", 58, 31, 50, 23, 1100, 2530, 506, 1210)
    assert [row.density for row in (*counts.labels.values(), counts.total)] == [0.6, 0.4, 0.46]
    assert counts.total.connections == nonzero(masks)


def test_without_labels_there_is_one_row_and_true_stands_for_a_dense_network() -> None:
    counts = count(mlp, MLP, True, array(11, 7))
    assert counts.labels == {}
    assert counts.total == ("all", 58, 58, 0, 0, 1100, 2530, 1100, 2530)
    assert [row["label"] for row in counts.rows()] == ["all"] and counts.total.density == 1.0


def test_rows_are_json_and_the_table_is_aligned() -> None:
    params = {"wide": jnp.ones((1000, 1000)), "head": jnp.ones((1000, 1))}
    masks = {"wide": jnp.zeros((1000, 1000), bool).at[0].set(True), "head": True}
    counts = by_path(lambda p, x: x @ p["wide"] @ p["head"], params, array(8, 1000), masks=masks)
    assert json.loads(json.dumps(counts.rows())) == counts.rows()
    assert counts.rows()[1] == {
        "label": "wide", "parameters": 10**6, "nonzero": 1000, "entries": 10**6, "connections": 1000, "density": 1e-3,
        "forward_flops": 16 * 10**6, "training_flops": 32 * 10**6,
        "free_forward_flops": 16000, "free_training_flops": 32000,
    }  # fmt: skip
    lines = str(counts).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert lines[2].split() == ["wide", "1,000,000", "1,000", "1,000", "0.001", "16M", "32M", "16k", "32k"]
    assert lines[3].split() == ["all", "1,001,000", "2,000", "1,000", "0.001", "16M", "32M", "32k", "80k"]


def test_numbers_of_the_table_have_three_digits() -> None:
    numbers = [0, 999, 999_400, 999_500, 1_234_567_890, 5 * 10**21]
    for number, shown in zip(numbers, ["0", "999", "999k", "1M", "1.23G", "5e+03E"], strict=True):
        row = Count("x", 0, 0, 0, 0, number, number, number, number)
        assert str(Counts({}, row, row)).split()[-4:] == [shown] * 4


def meetings(size: int, window: int, stride: int, low: int, high: int, spread: int, dilation: int) -> int:
    """Pairs of an output and a tap of the window that read an entry of the input: counted on a padded row of ones."""
    row = np.zeros((size - 1) * spread + 1)
    row[::spread] = 1
    row = np.pad(row, (low, high))
    reach = (window - 1) * dilation + 1
    return int(sum(row[at : at + reach : dilation].sum() for at in range(0, row.size - reach + 1, stride)))


@pytest.mark.parametrize(
    ("strides", "padding", "pads", "groups"),
    [
        ((1, 1), "VALID", ((0, 0), (0, 0)), 1),
        ((2, 1), "VALID", ((0, 0), (0, 0)), 2),
        ((1, 1), "SAME", ((1, 1), (0, 1)), 1),  # windows of 3 and 2: one before and one after, one after
        ((2, 2), "SAME", ((1, 1), (0, 0)), 4),  # 9 -> 5 needs 11, 6 -> 3 needs 6
        ((1, 1), ((4, 0), (2, 2)), ((4, 0), (2, 2)), 1),
    ],
)
def test_a_convolution_by_hand(strides: Any, padding: Any, pads: Any, groups: int) -> None:
    def apply(kernel: jax.Array, x: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=layout, feature_group_count=groups
        )

    masks = jnp.arange(3 * 2 * (4 // groups) * 8).reshape(3, 2, 4 // groups, 8) % 3 == 0
    total = count(apply, array(*masks.shape), masks, array(5, 9, 6, 4)).total
    high = meetings(9, 3, strides[0], *pads[0], 1, 1)
    wide = meetings(6, 2, strides[1], *pads[1], 1, 1)
    assert total.forward_flops == 2 * 5 * high * wide * (4 // groups) * 8
    assert total.training_flops == 2 * total.forward_flops
    assert total.free_forward_flops == round(total.forward_flops * int(masks.sum()) / masks.size)


def test_dilated_and_transposed_convolutions_by_hand() -> None:
    def dilated(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), ((2, 2),), rhs_dilation=(3,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    def transposed(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_transpose(x, kernel, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    kernel, x = array(3, 4, 6), array(2, 10, 4)
    assert count(dilated, kernel, True, x).total.forward_flops == 2 * 2 * 4 * 6 * meetings(10, 3, 1, 2, 2, 1, 3)
    # Every entry of the input meets every tap once.
    assert count(transposed, kernel, True, x).total.forward_flops == 2 * 2 * 4 * 6 * 10 * 3


def test_a_scan_over_layers_counts_its_length() -> None:
    params = {"first": array(6, 4), "layers": array(3, 4, 4)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        h = x @ params["first"]
        return jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), h, params["layers"])[0]

    masks = {"first": True, "layers": jnp.arange(48).reshape(3, 4, 4) < 12}
    counts = by_path(apply, params, array(5, 6), masks=masks)
    assert flops(counts, "first") == (240, 480)
    assert flops(counts, "layers") == (3 * 160, 3 * 480)
    assert counts.labels["layers"].free_training_flops == 3 * 480 // 4


def test_a_scan_whose_carry_comes_to_depend_on_params() -> None:
    def apply(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (h @ kernel, None), x, None, length=7)[0]

    # The first round's input is data, but all rounds are one program, whose input has a gradient.
    assert flops(count(apply, array(4, 4), True, array(5, 4))) == (7 * 160, 7 * 480)

    def rows(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (h @ kernel, h), x, None, length=7)[1]

    # The carry is not returned, but every row of the result is a carry.
    assert flops(count(rows, array(4, 4), True, array(5, 4))) == (7 * 160, 7 * 480)


def test_stacked_leaves_share_the_products_of_a_scan_by_their_size() -> None:
    params = {"a": array(4, 4), "b": array(4, 4), "bias": array(2, 4)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        kernels = jnp.stack([params["a"], params["b"]])
        step = lambda h, layer: (jax.nn.relu(h @ layer[0] + layer[1]), h)  # noqa: E731
        return jax.lax.scan(step, x, (kernels, params["bias"]))[0]

    counts = by_path(apply, params, array(5, 4), masks={"a": jnp.eye(4) > 0, "b": True, "bias": True})
    assert flops(counts, "a") == flops(counts, "b") == (160, 480)
    assert (counts.labels["a"].free_forward_flops, counts.labels["b"].free_forward_flops) == (40, 160)
    assert flops(counts, "bias") == (0, 0)


def test_a_leaf_that_is_used_twice_and_a_tied_embedding() -> None:
    params = {"embedding": array(20, 4), "kernel": array(4, 4)}

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        h = params["embedding"][tokens]
        h = jnp.tanh(h @ params["kernel"])
        return (h @ params["kernel"]) @ params["embedding"].T

    counts = by_path(apply, params, array(5, dtype=jnp.int32))
    # The embedding's entries learn, so every product is three; looking them up costs nothing.
    assert flops(counts, "kernel") == (2 * 160, 3 * 2 * 160)
    assert flops(counts, "embedding") == (2 * 5 * 4 * 20, 3 * 2 * 5 * 4 * 20)
    assert flops(counts, "other") == (0, 0)


def test_vmap_of_a_network_and_of_an_ensemble() -> None:
    one = lambda params, x: mlp(params, x)  # noqa: E731
    rows = lambda params, x: jax.vmap(lambda row: one(params, row))(x)  # noqa: E731
    assert count(rows, MLP, True, array(11, 7)) == count(mlp, MLP, True, array(11, 7))
    several = jax.tree.map(lambda leaf: array(4, *leaf.shape), MLP)
    ensemble = lambda params, x: jax.vmap(one, in_axes=(0, None))(params, x)  # noqa: E731
    assert flops(count(ensemble, several, True, array(11, 7))) == (4 * 1100, 4 * 2530)


def blocks(params: Any, x: jax.Array) -> jax.Array:
    """One attention head over (batch, time, features), with positions and a bias, and a residual."""
    x = x + params["positions"]
    q, k, v = (x @ params[name] + params["bias"] for name in ("q", "k", "v"))
    weights = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / 2.0)
    return x + weights @ v @ params["out"]


def attention_params(time: int, features: int) -> Any:
    kernels = {name: array(features, features) for name in ("q", "k", "v", "out")}
    return {**kernels, "positions": array(time, features), "bias": array(features)}


def test_attention_scores_belong_to_no_leaf() -> None:
    counts = by_path(blocks, attention_params(6, 8), array(2, 6, 8))
    for name in ("q", "k", "v", "out"):
        assert flops(counts, name) == (2 * 12 * 64, 3 * 2 * 12 * 64), name  # the positions learn: no first layer
    assert flops(counts, "other") == (2 * 2 * 2 * 36 * 8, 3 * 2 * 2 * 2 * 36 * 8)
    assert flops(counts, "positions") == flops(counts, "bias") == (0, 0)
    assert [row["label"] for row in counts.rows()][-2:] == ["other", "all"]
    assert sum(row["forward_flops"] for row in counts.rows()[:-1]) == counts.total.forward_flops
    (row,) = count(blocks, attention_params(6, 8), True, array(2, 6, 8)).rows()
    assert (row["label"], row["forward_flops"]) == ("all", counts.total.forward_flops)


def test_data_with_a_parameter_mixed_in_are_data() -> None:
    def apply(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return (x + params["positions"]) @ (y * params["scale"])

    counts = by_path(apply, {"positions": array(6, 8), "scale": array(8, 6)}, array(6, 8), array(8, 6))
    assert flops(counts, "other") == flops(counts) == (2 * 6 * 8 * 6, 3 * 2 * 6 * 8 * 6)
    # Against what has no parameter in it too.
    counts = by_path(lambda p, x: (x + p["positions"]) @ x.T, {"positions": array(6, 8)}, array(6, 8))
    assert flops(counts, "other") == flops(counts) == (2 * 6 * 8 * 6, 2 * 2 * 6 * 8 * 6)


def test_concatenated_kernels_share_by_size() -> None:
    params = {"q": array(6, 4), "kv": array(6, 8)}

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return x @ jnp.concatenate([params["q"], params["kv"].astype(jnp.float32)], axis=1)

    counts = by_path(apply, params, array(5, 6))
    assert flops(counts, "q") == (240, 480) and flops(counts, "kv") == (480, 960)


MASKED: dict[str, Callable[..., jax.Array]] = {
    "where": lambda kernel, x, mask, key: x @ jnp.where(mask, kernel, 0),
    "product": lambda kernel, x, mask, key: x @ (kernel * mask.astype(kernel.dtype)),
    "by the weights": lambda kernel, x, mask, key: x @ jnp.where(jnp.abs(kernel) > 0.1, kernel, 0),
    "half precision": lambda kernel, x, mask, key: x.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16),
    "transposed": lambda kernel, x, mask, key: (kernel.T @ x.T).T,
    "reshaped": lambda kernel, x, mask, key: jnp.einsum("bi,ijk->bjk", x, kernel.reshape(6, 2, 2)).reshape(5, 4),
    "standardised": lambda kernel, x, mask, key: x @ ((kernel - kernel.mean(0)) / (kernel.std(0) + 1e-6)),
    "dropped": lambda kernel, x, mask, key: x @ jnp.where(jax.random.bernoulli(key, 0.5, kernel.shape), kernel, 0),
    "noisy": lambda kernel, x, mask, key: x @ (kernel + jax.random.normal(key, kernel.shape)),
    "quantised": lambda kernel, x, mask, key: x @ (jnp.round(kernel * 9) / 9 + kernel),
    "in halves": lambda kernel, x, mask, key: jnp.hstack([x @ half for half in jnp.split(kernel, 2, 1)]),
    "jit": lambda kernel, x, mask, key: jax.jit(lambda kernel: x @ kernel)(kernel),
    "checkpoint": lambda kernel, x, mask, key: jax.checkpoint(lambda kernel: jnp.sin(x @ kernel))(kernel),
}


@pytest.mark.parametrize("form", MASKED)
def test_a_kernel_is_recognised_however_it_is_written(form: str) -> None:
    kernel, mask = array(6, 4), jnp.arange(24).reshape(6, 4) % 4 == 0

    def apply(params: Any, x: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
        return MASKED[form](params["kernel"], x, mask, key) + params["bias"]

    params, masks = {"kernel": kernel, "bias": array(4)}, {"kernel": mask, "bias": True}
    counts = by_path(apply, params, array(5, 6), mask, KEY, masks=masks)
    assert counts.labels["kernel"] == ("kernel", 24, 6, 24, 6, 240, 480, 60, 120)
    assert flops(counts) == (240, 480)


def test_which_of_two_leaves_a_product_belongs_to() -> None:
    params = {"latents": array(3, 6), "q": array(6, 6), "bias": array(6), "down": array(6, 2), "up": array(2, 6)}

    def apply(params: Any, x: jax.Array) -> Any:
        adapted = params["q"] + params["down"] @ params["up"]  # LoRA
        query = params["latents"] @ adapted + params["bias"]
        scores = query @ x.T  # activations on both sides, though no data are in the query
        return scores, params["q"] @ params["latents"].T

    counts = by_path(apply, params, array(5, 6))
    assert flops(counts, "q") == (2 * 2 * 3 * 36, 2 * 3 * 2 * 3 * 36)  # the larger one, left or right
    assert flops(counts, "up") == (2 * 36 * 2, 3 * 2 * 36 * 2)  # of two equal ones the right operand
    assert flops(counts, "other") == (2 * 3 * 6 * 5, 2 * 2 * 3 * 6 * 5)  # x needs no gradient
    assert flops(counts, "down") == flops(counts, "latents") == flops(counts, "bias") == (0, 0)


def test_experts_that_the_data_choose_are_weights_and_embeddings_meeting_each_other_are_not() -> None:
    params = {"experts": array(4, 6, 6), "table": array(9, 6), "router": array(6, 4)}

    def apply(params: Any, x: jax.Array, tokens: jax.Array) -> Any:
        chosen = params["experts"][jnp.argmax(x @ params["router"], axis=1)]
        seen = params["table"][tokens]
        return jnp.einsum("bi,bij->bj", x, chosen), seen @ seen.T

    counts = by_path(apply, params, array(5, 6), array(5, dtype=jnp.int32))
    assert flops(counts, "experts") == (2 * 5 * 36, 2 * 2 * 5 * 36)
    assert flops(counts, "table") == (0, 0)
    assert flops(counts, "router") == (2 * 5 * 24, 2 * 5 * 24)  # no gradient passes through an index
    assert flops(counts, "other") == (2 * 25 * 6, 3 * 2 * 25 * 6)


def test_a_cond_counts_its_dearest_branch_and_a_while_loop_one_round() -> None:
    params = {"thin": array(6, 2), "wide": array(6, 8), "loop": array(6, 6), "more": array(6, 6)}

    def choose(params: Any, x: jax.Array) -> jax.Array:
        thin = lambda params: (x @ params["thin"]).sum() + (x[0] @ params["thin"]).sum()  # noqa: E731
        return jax.lax.cond(x[0, 0] > 0, thin, lambda params: (x @ params["wide"]).sum(), params)

    counts = by_path(choose, params, array(5, 6))
    assert flops(counts, "wide") == (480, 960) and flops(counts, "thin") == (0, 0)

    def either(params: Any, x: jax.Array) -> jax.Array:
        return x @ jax.lax.cond(x[0, 0] > 0, lambda params: params["loop"], lambda params: params["more"], params)

    counts = by_path(either, params, array(5, 6))
    assert flops(counts, "other") == flops(counts) == (360, 720)  # it may be one leaf or the other

    def repeat(params: Any, x: jax.Array) -> jax.Array:
        h = jax.lax.while_loop(lambda h: (h @ params["thin"]).sum() < 9, lambda h: h @ params["loop"], x)
        return h @ params["wide"]

    counts = by_path(repeat, params, array(5, 6))
    assert flops(counts, "loop") == (360, 3 * 360) and flops(counts, "wide") == (480, 3 * 480)
    assert flops(counts, "thin") == (120, 120)  # a condition is not differentiated


def test_custom_derivatives_are_looked_into() -> None:
    @jax.custom_vjp
    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x @ kernel

    product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    @jax.custom_jvp
    def square(x: jax.Array) -> jax.Array:
        return x @ x

    square.defjvp(lambda primals, tangents: (square(*primals), tangents[0]))
    counts = by_path(lambda p, x: square(product(x, p["w"])), {"w": array(5, 5)}, array(5, 5))
    assert flops(counts, "w") == (250, 500) and flops(counts, "other") == (250, 750)


def test_what_reaches_no_output_and_what_has_no_gradient() -> None:
    params = {"a": array(6, 6), "b": array(6, 6), "c": array(6, 6)}

    def both(params: Any, x: jax.Array) -> Any:
        return x @ params["a"], x @ params["b"]

    counts = by_path(lambda params, x: jax.jit(both)(params, x)[0], params, array(5, 6))
    assert flops(counts, "a") == (360, 720) and flops(counts, "b") == (0, 0)

    def teacher(params: Any, x: jax.Array) -> Any:
        target = jax.lax.stop_gradient(jnp.tanh(x @ params["a"]) @ params["b"])
        return (x @ params["c"] - target) @ jax.lax.stop_gradient(params["b"])

    counts = by_path(teacher, params, array(5, 6))
    assert flops(counts, "a") == (360, 360)
    assert flops(counts, "c") == (360, 720)
    assert flops(counts, "b") == (720, 1080)  # no gradient of the target; of the input of the frozen b, but not of b
    counts = by_path(lambda params, x: jnp.argmax(x @ params["a"], 1), params, array(5, 6))
    assert flops(counts) == (360, 360)
    counts = by_path(lambda params, x: x @ params["a"], params | {"a": array(6, 6, dtype=jnp.int8)}, array(5, 6))
    assert flops(counts) == (360, 360)


@pytest.mark.slow
@pytest.mark.parametrize("masked_by", ["forward", "update"])
def test_sparse_layers_of_nnx_and_linen(masked_by: Any) -> None:
    nnx = pytest.importorskip("flax.nnx")
    from optax_structure import nn

    def check(counts: Counts) -> None:
        hidden, head = counts.labels["hidden_1"], counts.labels["head"]
        assert hidden.connections + head.connections == round(0.2 * (40 * 20 + 20 * 5)) and hidden.nonzero > 20
        assert flops(counts, "hidden_1") == (2 * 7 * 800, 2 * 2 * 7 * 800)
        assert flops(counts, "head") == (2 * 7 * 100, 3 * 2 * 7 * 100)
        assert hidden.free_training_flops == 2 * 2 * 7 * hidden.connections
        assert counts.total.free_training_flops == 2 * 7 * (2 * hidden.connections + 3 * head.connections)
        assert counts.total.nonzero == 180 + 25

    name = lambda params: map_with_path(lambda path, leaf: path.split("/")[0], params)  # noqa: E731
    model = nn.MLP([40, 20, 5], density=0.2, masked_by=masked_by, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    apply = lambda params, x: nnx.merge(graphdef, params, rest)(x)  # noqa: E731
    check(count(apply, params, nn.masks_of(model), array(7, 40), labels=name))

    linen = nn.linen.MLP((40, 20, 5), density=0.2, masked_by=masked_by)
    variables = linen.init(KEY, jnp.ones((1, 40)))
    masks = nn.linen.masks_of(variables)
    of_masks = lambda params, masks, x: linen.apply({"params": params, "masks": masks}, x)  # noqa: E731
    check(count(of_masks, variables["params"], masks, masks, array(7, 40), labels=name))


def test_errors_name_the_argument() -> None:
    x = array(11, 7)
    with pytest.raises(ValueError, match="apply is a dict, not the forward function"):
        count(MLP, True, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="masks does not have the structure of params at 'hidden'"):
        count(mlp, MLP, {"hidden": {"kernel": True}, "head": True}, x)
    with pytest.raises(ValueError, match="labels does not have the structure of params at 'the root'"):
        count(mlp, MLP, True, x, labels={"hidden": "a"})
    with pytest.raises(ValueError, match=r"masks have shape \(5, 7\) at 'hidden/kernel' where params have \(7, 5\)"):
        count(mlp, MLP, {"hidden": {"kernel": jnp.ones((5, 7), bool), "bias": True}, "head": True}, x)
    ragged = lambda w, x: jax.lax.ragged_dot(x, w, jnp.array([4, 7]))  # noqa: E731
    with pytest.raises(ValueError, match="apply has matrix products in 'ragged_dot_general'"):
        count(ragged, array(2, 7, 5), True, x)
    rows = jax.sharding.PartitionSpec("rows")
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    split = jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(None, rows), out_specs=rows)
    with pytest.raises(ValueError, match="apply has matrix products in 'shard_map'"):
        count(split, array(7, 5), True, x)


def conv_net(params: Any, x: jax.Array) -> jax.Array:
    def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: str, groups: int = 1) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=layout, feature_group_count=groups
        )

    x = jax.nn.relu(conv(x, params["first"], 1, "SAME"))
    x = jax.nn.relu(conv(x, params["grouped"], 2, "SAME", 2))
    x = jax.nn.relu(conv(x, params["last"], 1, "VALID"))
    return x.reshape(x.shape[0], -1) @ params["head"]


NETS: dict[str, tuple[Callable[..., jax.Array], Any, Any]] = {
    "mlp": (mlp, {
        "hidden": {"kernel": array(96, 128), "bias": array(128)}, "head": {"kernel": array(128, 64), "bias": array(64)}
    }, array(32, 96)),
    "cnn": (conv_net, {
        "first": array(3, 3, 8, 32), "grouped": array(3, 3, 16, 32), "last": array(2, 2, 32, 32),
        "head": array(32 * 36, 32),
    }, array(4, 14, 14, 8)),
    "attention": (blocks, attention_params(16, 128), array(4, 16, 128)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_the_sum_is_what_xla_counts(name: str) -> None:
    apply, params, x = NETS[name]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(apply(params, x) ** 2)

    def compiled(fn: Callable[..., Any]) -> float:
        return jax.jit(fn).lower(params, x).compile().cost_analysis()["flops"]

    forward, training = flops(count(apply, params, True, x))
    # XLA counts the work element by element too: a few per cent more.
    assert forward <= compiled(apply) <= 1.04 * forward
    assert training <= compiled(jax.value_and_grad(loss)) <= 1.04 * training


@pytest.mark.slow
def test_the_network_of_the_sparse_benchmarks() -> None:
    widths = (784, 512, 512, 10)
    params = {f"layer_{i}": {"kernel": array(a, b)} for i, (a, b) in enumerate(itertools.pairwise(widths))}
    masks = random_masks(KEY, params, 0.02)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        for layer in params.values():
            x = jax.nn.relu(x @ layer["kernel"])
        return x

    total = count(apply, params, masks, array(128, 784)).total
    living = [int(layer["kernel"].sum()) for layer in masks.values()]
    assert total.connections == total.nonzero == round(0.02 * (784 * 512 + 512 * 512 + 512 * 10))
    assert total.training_flops == 2 * 128 * (2 * 784 * 512 + 3 * 512 * 512 + 3 * 512 * 10)
    assert total.free_training_flops == 2 * 128 * (2 * living[0] + 3 * living[1] + 3 * living[2])
