"""The top 5 % of a 784 x 512 leaf: radix selection against a stable argsort and ``lax.top_k``.

All arms are exact and give the same mask. How it is measured: ``interleaved.py``.

    python benchmarks/selection.py --out selection.json
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from interleaved import measure, parser, report
from jax import Array

from optax_structure.sparsity.topk import top_k_mask


def by_argsort(scores: Array, k: Array) -> Array:
    """The k highest by a stable descending sort of the whole leaf; k may be traced."""
    order = jnp.argsort(scores.ravel(), descending=True, stable=True)
    return jnp.zeros(scores.size, bool).at[order].set(jnp.arange(scores.size) < k).reshape(scores.shape)


def by_top_k(scores: Array, k: int) -> Array:
    """The k highest by ``lax.top_k``, which needs a static k."""
    _, chosen = jax.lax.top_k(scores.ravel(), k)
    return jnp.zeros(scores.size, bool).at[chosen].set(True).reshape(scores.shape)


def main() -> None:
    options = parser(__doc__ or "", rounds=30)
    options.add_argument("--rows", type=int, default=784)
    options.add_argument("--columns", type=int, default=512)
    options.add_argument("--density", type=float, default=0.05)
    args = options.parse_args()

    scores = jax.random.normal(jax.random.key(0), (args.rows, args.columns))
    tied = jnp.round(4 * scores)
    count = round(args.density * scores.size)
    k = jnp.int32(count)
    argsort, top_k = jax.jit(by_argsort), jax.jit(by_top_k, static_argnums=1)
    for values in (scores, tied):
        expected = np.asarray(argsort(values, k))
        assert (np.asarray(top_k_mask(values, k)) == expected).all(), "the arms must agree"
    assert (np.asarray(top_k(scores, count)) == np.asarray(argsort(scores, k))).all(), "the arms must agree"

    times = measure(
        {
            "radix": lambda: top_k_mask(scores, k),
            "argsort": lambda: argsort(scores, k),
            "lax.top_k": lambda: top_k(scores, count),
            "radix, ties at the threshold": lambda: top_k_mask(tied, k),
        },
        args.rounds,
    )
    report(f"top {count} of {args.rows} x {args.columns} float32", times, args.out)


if __name__ == "__main__":
    main()
