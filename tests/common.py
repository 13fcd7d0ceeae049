"""What a row of the property suite says, and the small trees that it runs on. The table itself is ``tests/rows.py``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_structure as oxs
from optax_structure._tree import PyTree, leaves_by_path, map_with_path

Arguments = Callable[[PyTree], dict[str, Any]]
ROOT = Path(__file__).resolve().parents[1]


def child_environment() -> dict[str, str]:
    """The environment of a process that a test starts: this package, and the compilation cache of this process.

    What the suite or an earlier child has compiled is read from there, however short its compilation was.
    """
    found = {
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if folder := jax.config.jax_compilation_cache_dir:
        found["JAX_COMPILATION_CACHE_DIR"] = folder
    return os.environ | found


def nothing(params: PyTree) -> dict[str, Any]:
    """No arguments."""
    del params
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One transformation, or one of its ways.

    Attributes:
      name: shown as the id of the test.
      factory: builds it. An outer wrapper gets the inner optimizer as its first argument.
      arguments: ``params -> keyword arguments`` of the factory. Numbers among them are injected by the test of
        ``optax.inject_hyperparams``, everything else is static.
      extra: ``params -> extra arguments`` of ``update``.
      needs: which of these it cannot do without.
      wraps: an outer wrapper (``per_leaf``, ``sparse``), no member of a chain.
      first: a member that stands before the optimizer, not after it.
      neutral: arguments (and ``neutral_extra``) with which it changes nothing.
      frozen: arguments with which the entries of ``frozen_where(params)`` never move.
      hides: a wrapper that shows the inner optimizer some leaves only, so that its state does not follow all of them.
      slow: it runs with the slow tests: its programs are large, or another row is nearly the same.
      across_leaves: a leaf's update depends on other leaves, so that ``optax.partition`` changes it.
      bad: arguments, each put in place of a good one, and the message that they must raise. A callable gets params.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    arguments: Arguments = nothing
    extra: Arguments = nothing
    needs: tuple[str, ...] = ()
    wraps: bool = False
    first: bool = False
    neutral: Arguments | None = None
    neutral_extra: Arguments | None = None
    frozen: Arguments | None = None
    frozen_where: Callable[[PyTree], PyTree] = lambda params: jax.tree.map(lambda _: True, params)
    hides: bool = False
    slow: bool = False
    across_leaves: bool = False
    bad: tuple[tuple[Mapping[str, Any], str], ...] = ()

    def around(
        self, inner: optax.GradientTransformation, params: PyTree, arguments: Arguments | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer ``inner`` with the transformation after it (before it, around it)."""
        made = (arguments or self.arguments)(params)
        if self.wraps:
            return optax.with_extra_args_support(self.factory(inner, **made))
        member = self.factory(**made)
        return optax.chain(member, inner) if self.first else optax.chain(inner, member)

    def alone(self, params: PyTree) -> optax.GradientTransformationExtraArgs:
        """The transformation by itself; a wrapper around momentum."""
        if self.wraps:
            return self.around(optax.trace(0.9), params)
        return optax.with_extra_args_support(self.factory(**self.arguments(params)))


# Trees. Every function takes any params tree, so that a row serves dicts, lists, dataclasses and NNX states alike.


def masks(params: PyTree) -> PyTree:
    """Kernels at about 60 % density, other leaves not sparse."""

    def mask(path: str, leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.asarray(True)
        return jnp.asarray(np.random.default_rng(leaf.shape).random(leaf.shape) < 0.6)

    return map_with_path(mask, params)


def full_masks(params: PyTree) -> PyTree:
    """Every connection exists; kernels have arrays, other leaves a scalar."""
    return jax.tree.map(lambda p: jnp.ones(p.shape if p.ndim > 1 else (), bool), params)


def off_mask(params: PyTree) -> PyTree:
    """Where no connection exists."""
    return jax.tree.map(jnp.logical_not, masks(params))


def make_params(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Two dense layers, their weights exactly 0 off ``masks``."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": {"kernel": (4, 6), "bias": (6,)}, "head": {"kernel": (6, 2), "bias": (2,)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    return oxs.apply_masks(params, masks(params))


def make_grads(params: PyTree, steps: int = 3, seed: int = 1) -> PyTree:
    """Gradients of ``steps`` steps, stacked along a first axis. Dense: off the mask too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype), params)


def labels(params: PyTree) -> PyTree:
    """``scaffold`` and ``new`` in turn."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, ["scaffold" if index % 2 else "new" for index in range(len(leaves))])


def labelled(name: str) -> Callable[[PyTree], PyTree]:
    """``params -> True`` at the leaves of one label."""
    return lambda params: jax.tree.map(lambda label: label == name, labels(params))


def depths(params: PyTree) -> PyTree:
    """0, 0, 1, 1, ... along the leaves."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [index // 2 for index in range(len(leaves))])


def with_masks(params: PyTree) -> dict[str, Any]:
    return {"masks": masks(params)}


def with_changed_masks(params: PyTree) -> dict[str, Any]:
    return {"masks": masks(params), "masks_changed": jnp.asarray(True)}


def with_full_masks(params: PyTree) -> dict[str, Any]:
    return {"masks": full_masks(params)}


def multi_steps(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Two gradients an update. ``MultiSteps.gradient_transformation()`` would drop the extra arguments."""
    made = optax.MultiSteps(inner, 2)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def inner_optimizers() -> dict[str, optax.GradientTransformation]:
    """Sixteen optimizers by name. ``plateau`` needs ``value=``."""
    return {
        "adam": optax.adam(1e-2),
        "adamw": optax.adamw(1e-2, weight_decay=0.1),
        "sgd": optax.sgd(1e-2),
        "momentum": optax.sgd(optax.cosine_decay_schedule(1e-2, 10), momentum=0.9),
        "lion": optax.lion(1e-3),
        "rmsprop": optax.rmsprop(1e-2, centered=True),
        "adagrad": optax.adagrad(1e-2),
        "lamb": optax.lamb(1e-2),
        "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
        "novograd": optax.novograd(1e-2),
        "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        "multi_steps": multi_steps(optax.adam(1e-2)),
        "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
        "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        "partition": optax.partition({"scaffold": optax.adam(1e-2), "new": optax.sgd(1e-2)}, labels),
        "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    }


def base_optimizer(learning_rate: Any = 0.1) -> optax.GradientTransformation:
    """Moments and a step count in a program that compiles fast: momentum whose rate falls."""
    return optax.chain(
        optax.trace(0.9), optax.scale_by_schedule(lambda count: 1.0 / (count + 1.0)), optax.scale(-learning_rate)
    )


class Trained(NamedTuple):
    """What a run left: the updates of all steps (stacked along a first axis), the last state and parameters."""

    updates: PyTree
    state: Any
    params: PyTree


def train(tx: optax.GradientTransformation, params: PyTree, grads: PyTree, /, **extra: Any) -> Trained:
    """As many steps as ``grads`` holds, to be jitted. ``lax.scan`` demands a state of one structure."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, grad: PyTree) -> Any:
        params, state = carry
        updates, state = tx.update(grad, state, params, **extra)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
    return Trained(updates, state, params)


def take(tree: PyTree, index: Any) -> PyTree:
    """``leaf[index]`` of every leaf: one step of stacked gradients or updates."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_close(actual: PyTree, expected: PyTree, rtol: float = 1e-6) -> None:
    """Every leaf agrees to ``rtol`` of its largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    wanted = leaves_by_path(expected)
    for path, leaf in leaves_by_path(actual).items():
        right = np.asarray(wanted[path], np.float64)
        scale = np.max(np.abs(right), initial=0.0)
        np.testing.assert_allclose(np.asarray(leaf, np.float64), right, rtol=rtol, atol=rtol * scale, err_msg=path)


def assert_equal(actual: PyTree, expected: PyTree) -> None:
    """Same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, leaf), right in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(leaf) == jnp.shape(right) and jnp.asarray(leaf).dtype == jnp.asarray(right).dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right), err_msg=jax.tree_util.keystr(path))
