"""Parameters, living connections and FLOPs: the rows, their table, and how the products are shared among the rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structure._tree import Params, PyTree, align, leaves_by_path
from optax_structure.accounting._program import Product, products_of


class Count(NamedTuple):
    """One row of ``Counts``.

    Attributes:
      label: of the leaves; ``"all"``, or ``"other"`` for the products that belong to no leaf.
      parameters: entries of all leaves.
      nonzero: entries that exist: the connections of sparse leaves, and the other leaves (biases, scales) whole.
      entries: entries of the sparse leaves, those whose mask is not a scalar.
      connections: of these, the ones that exist.
      forward_flops: of the forward pass as executed: 2 a multiply-add, those with masked zeros among them.
      training_flops: of forward and backward pass as executed.
      free_forward_flops: of the forward pass if products with what does not exist cost nothing.
      free_training_flops: of forward and backward pass, likewise.
    """

    label: str
    parameters: int
    nonzero: int
    entries: int
    connections: int
    forward_flops: int
    training_flops: int
    free_forward_flops: int
    free_training_flops: int

    @property
    def density(self) -> float:
        """The share of connections that exist; 1.0 where no leaf is sparse."""
        return self.connections / self.entries if self.entries else 1.0


class Counts(NamedTuple):
    """What ``count`` returns; ``str`` of it is a table, in which ``free`` says what it were if sparsity were free.

    Attributes:
      labels: label -> its row, in the order of the leaves; empty without labels.
      other: products that belong to no leaf, as between queries and keys. It has no parameters.
      total: everything.
    """

    labels: dict[str, Count]
    other: Count
    total: Count

    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain dicts, for JSON: one a label, ``"other"`` where there are such products, then ``"all"``.

        Example:
          >>> import jax.numpy as jnp
          >>> from optax_structure.accounting import count
          >>> rows = count(lambda w, x: x @ w, jnp.ones((3, 2)), True, jnp.ones((5, 3))).rows()
          >>> len(rows), rows[0]["label"], rows[0]["forward_flops"], rows[0]["density"]
          (1, 'all', 60, 1.0)
        """
        others = [self.other] if self.labels and self.other.forward_flops else []
        return [row._asdict() | {"density": row.density} for row in (*self.labels.values(), *others, self.total)]

    def __str__(self) -> str:
        names = ("parameters", "non-zero", "connections", "density", "forward", "training")
        table: list[Sequence[str]] = [("FLOPs of one step", *names, "free forward", "free training")]
        for row in self.rows():
            numbers = (f"{row[name]:,}" for name in ("parameters", "nonzero", "connections"))
            flops = (_short(row[name]) for name in Count._fields if name.endswith("flops"))
            table.append((str(row["label"]), *numbers, f"{row['density']:.3g}", *flops))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)


def _short(number: int) -> str:
    """Three digits and a prefix: 1234567 -> 1.23M."""
    power = 0
    while power < 6 and float(f"{number / 1000**power:.3g}") >= 1000:
        power += 1
    return f"{number / 1000**power:.3g}" + ("", *"kMGTPE")[power]


def count(
    apply: Callable[..., Any],
    params: Params,
    masks: PyTree,
    *example: Any,
    labels: PyTree | Callable[[Params], PyTree] | None = None,
) -> Counts:
    """Count parameters, connections and the FLOPs of one step, per label and in all.

    Nothing is computed: ``apply`` is traced on shapes. FLOPs are those of matrix products and convolutions, 2 for each
    multiply-add, for the whole batch of ``example``. What works element by element is not counted: activations,
    normalisation, masking, gathers, the optimizer, and so the layers of constant fan-in, which multiply and add without
    a matrix product (2 a weight and row). The padding of a convolution costs nothing, as in XLA's analysis.

    A product belongs to the parameter leaf that one of its operands stands for, through casts, transposes, reshapes,
    slices, masks and arithmetic with constants and other parameters (of several leaves it is the largest; leaves that
    are concatenated share by their size). Where both operands stand for leaves it is the larger; where neither does,
    the product is ``other``. A mask that is part of ``example`` has to be bool; it may be cast in ``apply``.

    The backward pass costs each product again for every operand that a parameter reaches: once for a weight, once for
    an input, but not for the input of a first layer. All floating parameters are taken as trained and all floating
    outputs as differentiated, except through ``stop_gradient``; what ``jax.checkpoint`` computes a second time is not
    counted. If sparsity were free, forward pass, weight gradient and input gradient would cost the leaf's density
    times as much. ``lax.scan`` counts as often as it is long, ``lax.cond`` with its dearest branch,
    ``lax.while_loop`` once.

    Args:
      apply: ``(params, *example) -> outputs``, pure; of an NNX model, split into ``graphdef, params, rest``,
        ``lambda params, x: nnx.merge(graphdef, params, rest, copy=True)(x)``. Data have to come in as ``example``: what
        is closed over is taken for a constant.
      params: tree of arrays or ``jax.ShapeDtypeStruct``; only shapes are read.
      masks: tree of masks as ``random_masks`` returns it, concrete; a scalar ``True`` for a leaf that is not sparse,
        or for the whole tree.
      example: the inputs of one batch, arrays or ``jax.ShapeDtypeStruct``.
      labels: tree of labels or function of the params; without it there is one row.

    Returns:
      ``Counts``.

    Raises:
      ValueError: for an ``apply`` that cannot be called, ``masks`` or ``labels`` of another structure, a mask of
        another shape than its leaf, and for matrix products that cannot be followed (in ``jax.shard_map``, Pallas
        kernels, ``jax.lax.ragged_dot``).

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure.accounting import count
      >>> params = {"hidden": {"kernel": jnp.ones((784, 512)), "bias": jnp.ones(512)}, "out": jnp.ones((512, 10))}
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["out"]
      >>> masks = oxs.random_masks(jax.random.key(0), params, 0.05, distribution="uniform")
      >>> counts = count(apply, params, masks, jnp.ones((128, 784)), labels={"hidden": "scaffold", "out": "new"})
      >>> print(counts)
      FLOPs of one step  parameters  non-zero  connections  density  forward  training  free forward  free training
      scaffold              401,920    20,582       20,070     0.05     103M      206M         5.14M          10.3M
      new                     5,120       256          256     0.05    1.31M     3.93M         65.5k           197k
      all                   407,040    20,838       20,326     0.05     104M      209M          5.2M          10.5M
      >>> counts.total.training_flops == 2 * 128 * (2 * 784 * 512 + 3 * 512 * 10)
      True
    """
    if not callable(apply):
        kind = type(apply).__name__  # not the value: it is likely to be the params
        raise ValueError(f"apply is a {kind}, not the forward function: call count(apply, params, masks, *example).")
    living = _living(leaves_by_path(params), jax.tree.leaves(align(masks, params, "masks")))
    names = [] if labels is None else jax.tree.leaves(align(labels, params, "labels"))
    flops = _flops_by_leaf(products_of(apply, params, *example), living)

    def row(label: str, places: Sequence[int | None]) -> Count:
        leaves = [living[place] for place in places if place is not None]
        sparse = [leaf for leaf in leaves if leaf.sparse]
        sizes = [sum(of) for some in (leaves, sparse) for of in ([x.size for x in some], [x.lives for x in some])]
        return Count(label, *sizes, *(round(sum(flops[place][kind] for place in places)) for kind in range(4)))

    members = {name: [place for place, other in enumerate(names) if other == name] for name in names}
    return Counts(
        labels={name: row(name, places) for name, places in members.items()},
        other=row("other", [None]),
        total=row("all", [*range(len(living)), None]),
    )


class _Leaf(NamedTuple):
    """Entries of a leaf, how many of them exist, and whether it is sparse."""

    size: int
    lives: int
    sparse: bool

    @property
    def density(self) -> Fraction:
        return Fraction(self.lives, self.size) if self.size else Fraction(1)


def _living(leaves: Mapping[str, Any], masks: Sequence[Any]) -> list[_Leaf]:
    found = []
    for (path, leaf), mask in zip(leaves.items(), masks, strict=True):
        shape, size = jnp.shape(leaf), math.prod(jnp.shape(leaf))
        if not jnp.ndim(mask):
            found.append(_Leaf(size, size, False))
        elif jnp.shape(mask) == shape:
            found.append(_Leaf(size, int(jnp.count_nonzero(mask)), True))
        else:
            raise ValueError(f"masks have shape {jnp.shape(mask)} at {path!r} where params have {shape}.")
    return found


def _flops_by_leaf(products: Sequence[Product], living: Sequence[_Leaf]) -> dict[int | None, list[Fraction]]:
    """Leaf (None: no leaf) -> FLOPs in the order of the fields of ``Count``. Fractions, so that sums are exact."""
    flops: dict[int | None, list[Fraction]] = defaultdict(lambda: [Fraction(0)] * 4)
    for product in products:
        shares = {leaf: Fraction(entries, product.entries) for leaf, entries in product.leaves.items() if entries}
        for leaf, share in shares.items() if shares else [(None, Fraction(1))]:
            forward, density = share * product.flops, Fraction(1) if leaf is None else living[leaf].density
            training = forward * (1 + product.backward)
            more = (forward, training, forward * density, training * density)
            flops[leaf] = [old + new for old, new in zip(flops[leaf], more, strict=True)]
    return flops
