"""The main job on other devices: its step lowers for all of them, and growth goes on over a mesh as on one device.

That every public transformation lowers is a property of the table (``test_common.py``), and that each growth action
keeps sharding and dtype by itself is tested beside the actions (``test_growth.py``). Here they are put together as the
main job does it: its step, its optimizer, growth, ``transfer_state``, and training on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_structure as oxs
from optax_structure._tree import PyTree, leaves_by_path
from optax_structure.structure import Growth, Units
from optax_structure.training.config import Config
from optax_structure.training.network import chain, dense_gradients, init_params, params_like
from optax_structure.training.step import Carry, Program, first_stats, make_program, make_tx

SIZES = (12, 16, 4)
STEPS, BATCH, TOTAL = 6, 16, 200
# Every rule of the chain is in: two rates, warm-up, and a scaffold that is slowed after growth.
CONFIG = Config(widths=SIZES[1:-1], density=0.5, final_density=0.5, strategy="dual", on_growth="slow", warmup=4)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, SIZES[0])).astype(np.float32)
Y = RNG.integers(0, SIZES[-1], 64).astype(np.int32)


class Job(NamedTuple):
    """The main job between two dispatches."""

    units: Units
    labels: PyTree
    program: Program
    carry: Carry


def begin(dtype: Any = jnp.float32) -> Job:
    units = chain(SIZES)
    like = params_like(units)
    masks = jax.jit(lambda key: oxs.random_masks(key, like, CONFIG.density))(jax.random.key(0))
    params = jax.jit(lambda key, masks: init_params(key, like, masks, units, jnp.asarray(X)))(jax.random.key(1), masks)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    labels = jax.tree.map(lambda _: "scaffold", params)
    tx = make_tx(CONFIG, TOTAL, masks)
    return Job(
        units, labels, make_program(tx, units), Carry(params, jax.jit(tx.init)(params), first_stats(params, units))
    )


def train(job: Job, chunk: int) -> tuple[Job, np.ndarray]:
    """``STEPS`` steps of the compiled program; the losses. The arrays of ``job`` are donated."""
    index = np.random.default_rng(chunk).integers(0, len(X), (STEPS, BATCH)).astype(np.int32)
    carry, (losses, _) = job.program.run(job.carry, jnp.asarray(X), jnp.asarray(Y), index)
    return job._replace(carry=carry), np.asarray(losses)


def act(job: Job, action: str) -> Growth:
    """One growth action on a job, at its extrema where it takes them."""
    masks, key = oxs.get_masks(job.carry.opt_state), jax.random.key(7)
    net = (job.carry.params, job.labels, masks, job.units)
    # Some units at either end, whatever the statistics say.
    unit = jnp.arange(job.units.group("hidden_1").size)
    extrema = oxs.Extrema(dead={"hidden_1": unit < 3}, saturated={"hidden_1": unit >= 13})
    if action == "add_connections":
        scores = oxs.extrema_scores(job.carry.params, masks, job.units, extrema, key=key)
        return oxs.add_connections(*net, 9, key=key, scores=scores, component="new", init="fan_in")
    if action == "prune_connections":
        return oxs.prune_connections(*net, 7, key=key)
    if action == "embed_patches":
        return oxs.embed_patches(*net, 2, key=key, size=3, extrema=extrema)
    if action == "widen":
        return oxs.widen(*net, "hidden_1", 2, key=key)
    if action == "widen_odd":
        return oxs.widen(*net, "hidden_1", 1, key=key)
    return oxs.insert_layer(*net, "hidden_1", key=key)


# Every action once, edits of masks and changes of shape in either dtype. An odd width does not divide by two.
ACTIONS = {
    "float32": ("add_connections", "embed_patches", "widen", "insert_layer"),
    "bfloat16": ("prune_connections", "widen_odd"),
}


def go_on(job: Job, growth: Growth) -> Job:
    """The job with the grown structure, as the main job's loop does it."""
    params, opt_state, stats = job.carry
    grads = dense_gradients(growth.params, growth.units, jnp.asarray(X), jnp.asarray(Y))
    old_tx, reshaped = job.program.tx, growth.units != job.units
    tx = make_tx(CONFIG, TOTAL, growth.masks) if reshaped else old_tx
    opt_state = oxs.transfer_state(old_tx, opt_state, params, tx, growth.params, growth=growth, grads=grads)
    if reshaped:
        stats = first_stats(growth.params, growth.units)
    program = make_program(tx, growth.units) if reshaped else job.program
    return Job(growth.units, growth.labels, program, Carry(growth.params, opt_state, stats))


def spread(carry: Carry, mesh: Mesh) -> Carry:
    """A carry over the mesh: every array of a kernel's or a bias' shape split along its last axis, the rest whole."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(carry.params)}

    def put(leaf: jax.Array) -> jax.Array:
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "model") if leaf.shape in shapes else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, carry)


def copied(job: Job) -> Job:
    """The job with arrays of its own, so that a dispatch of the other may donate them."""
    return job._replace(carry=jax.tree.map(jnp.copy, job.carry))


def param_shaped(state: PyTree, params: PyTree) -> dict[str, Any]:
    """The arrays of an optimizer state that stand for a whole parameter, by a path that ends in the parameter's."""
    paths = leaves_by_path(params)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        owner = next((p for p in paths if name.endswith(f"/{p}")), None)
        if owner is not None and leaf.shape == paths[owner].shape:
            found[name] = (leaf, paths[owner])
    return found


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """Only results count here, so programs are compiled quickly rather than well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("on_growth", ["none", "freeze"])
def test_the_step_of_the_main_job_lowers_for_cpu_cuda_and_tpu(on_growth: str) -> None:
    job = begin()
    tx = make_tx(CONFIG.replace(on_growth=on_growth), TOTAL, oxs.get_masks(job.carry.opt_state))
    carry = job.carry._replace(opt_state=tx.init(job.carry.params))
    index = jnp.zeros((STEPS, BATCH), jnp.int32)
    program = make_program(tx, job.units)
    exported = jax.export.export(program.run, platforms=("cpu", "cuda", "tpu"))(carry, X, Y, index)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.in_tree.num_leaves == len(jax.tree.leaves((carry, X, Y, index)))


@pytest.mark.slow
def test_the_step_lowers_after_growth_and_computes_the_same() -> None:
    job = begin()
    job = go_on(job, act(job, "insert_layer"))
    index = np.random.default_rng(1).integers(0, len(X), (STEPS, BATCH)).astype(np.int32)
    exported = jax.export.export(job.program.run, platforms=("cpu", "cuda", "tpu"))(job.carry, X, Y, index)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    _, (losses, _) = exported.call(copied(job).carry, X, Y, index)
    np.testing.assert_allclose(losses, train(job, 1)[1], rtol=1e-6)


def compare_growth(over: Growth, alone: Growth, before: Carry, mesh: Mesh, action: str) -> None:
    """A growth over the mesh has the numbers of one on one device, and the places and dtypes that were there before."""
    assert over.units == alone.units and over.labels == alone.labels, action
    old, masks = leaves_by_path(before.params), leaves_by_path(over.masks)
    for path, leaf in leaves_by_path(over.params).items():
        name, mask = f"{action} {path}", masks[path]
        assert leaf.dtype == jax.tree.leaves(before.params)[0].dtype, name
        if leaf.shape[-1] % 2 == 0:
            before_it = old[path.replace("_next", "")]  # an inserted layer lies as the one that it stands behind
            assert leaf.sharding.is_equivalent_to(before_it.sharding, leaf.ndim), name
        else:
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec()), leaf.ndim), name
        if np.ndim(mask):
            assert mask.dtype == bool and mask.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
        np.testing.assert_array_equal(leaf, leaves_by_path(alone.params)[path], err_msg=name)
        np.testing.assert_array_equal(mask, leaves_by_path(alone.masks)[path], err_msg=name)


def compare_states(two: Job, one: Job, rtol: float, mesh: Mesh, action: str) -> None:
    """A state over the mesh is that on one device; what stands for a parameter lies where the parameter does."""
    shaped = param_shaped(two.carry.opt_state, two.carry.params)
    kernels = [path for path in leaves_by_path(two.carry.params) if path.endswith("kernel")]
    # First and second moments of all leaves, masks and cohorts of kernels.
    assert len(shaped) == 2 * len(leaves_by_path(two.carry.params)) + 2 * len(kernels), sorted(shaped)
    for name, (leaf, param) in shaped.items():
        assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), (action, name)
    alone = jax.tree.leaves(one.carry.opt_state)
    for (path, leaf), right in zip(jax.tree_util.tree_leaves_with_path(two.carry.opt_state), alone, strict=True):
        name = f"{action} {jax.tree_util.keystr(path)}"
        assert leaf.dtype == right.dtype and leaf.sharding.device_set == set(mesh.devices.flat), name
        np.testing.assert_allclose(*(np.asarray(x, np.float64) for x in (leaf, right)), rtol, 1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_growth_and_training_over_a_mesh_are_those_on_one_device(dtype: str) -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    rtol = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # a weight may fall on the other side of a rounding
    one = begin(jnp.dtype(dtype))
    two = one._replace(carry=spread(copied(one).carry, mesh), program=make_program(one.program.tx, one.units))

    for number, action in enumerate(("start", *ACTIONS[dtype])):
        if action != "start":
            # The same numbers on both sides, so that a choice among nearly equal weights falls the same way. By way
            # of NumPy: a buffer that both sides share would be gone once one of them donates it.
            carry = jax.tree.map(
                lambda value, there: jax.device_put(np.array(value), there.sharding), one.carry, two.carry
            )
            alone, over = act(one, action), act(two._replace(carry=carry), action)
            compare_growth(over, alone, carry, mesh, action)
            one, two = go_on(one, alone), go_on(two._replace(carry=carry), over)
            compare_states(two, one, rtol, mesh, action)
        placed = {path: leaf.sharding for path, leaf in leaves_by_path(two.carry.params).items()}
        one, losses = train(one, number)
        two, over_mesh = train(two, number)
        np.testing.assert_allclose(over_mesh, losses, rtol=rtol, err_msg=action)
        for path, leaf in leaves_by_path(two.carry.params).items():
            assert leaf.dtype == dtype and leaf.sharding.is_equivalent_to(placed[path], leaf.ndim), (action, path)
        # Traced once a shape: an edit of masks compiles nothing, over a mesh either.
        assert two.program.traces == [1] and two.program.run._cache_size() <= 1, action
