"""The table of every public transformation.

``tests/test_common.py`` runs every property on every row, so a new transformation gets all of them by one entry in
``ROWS``. Where a transformation cannot have a property, its row says so by leaving a field empty.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from common import (
    PyTree,
    Row,
    depths,
    full_masks,
    labelled,
    labels,
    masks,
    nothing,
    off_mask,
    with_changed_masks,
    with_full_masks,
    with_masks,
)

import optax_structure as oxs
from optax_structure._tree import leaves_by_path

# Factories whose numbers are keyword arguments, so that optax.inject_hyperparams can reach them.


def connection(
    scaffold: float = 1.0, patch: float = 1.0, schedule: optax.Schedule | None = None
) -> optax.GradientTransformationExtraArgs:
    rules = [oxs.component_rule(scaffold=scaffold, patch=patch)]
    return oxs.scale_by_connection(*rules, *([oxs.age_rule(schedule)] if schedule else []))


def kernel_units(params: PyTree) -> oxs.Units:
    """Every kernel makes the units of a layer of its own name."""
    kernels = {path: leaf for path, leaf in leaves_by_path(params).items() if jnp.ndim(leaf) > 1}
    return oxs.Units(
        tuple(
            oxs.UnitGroup(path, leaf.shape[-1], (oxs.UnitAxis(path, leaf.ndim - 1, "incoming"),))
            for path, leaf in kernels.items()
        )
    )


def with_moments_and_extrema(params: PyTree) -> dict[str, Any]:
    """Second moments from 0 to 2, and every other unit dead."""
    moments = jax.tree.map(lambda p: jnp.linspace(0.0, 2.0, p.size).reshape(p.shape), params)
    dead = {group.layer: jnp.arange(group.size) % 2 == 0 for group in kernel_units(params).groups}
    return {"second_moment": moments, "extrema": oxs.Extrema(dead, {})}


def elements(
    units: oxs.Units,
    depths: PyTree,
    strong_factor: float = 1.0,
    high_factor: float = 1.0,
    fine: float = 1.0,
    boost: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    return oxs.scale_by_connection(
        oxs.strength_rule(strong_factor=strong_factor, weak_factor=1.0),
        oxs.scale_rule(depths, coarse=1.0, fine=fine),
        oxs.gradient_rule(high_factor=high_factor, low_factor=1.0),
        oxs.extrema_rule(units, boost=boost),
    )


def observed(inner: optax.GradientTransformation, high_factor: float = 0.5) -> optax.GradientTransformationExtraArgs:
    """``observe`` around an optimizer with moments of its own after it, and a rule that reads them."""
    rules = oxs.scale_by_connection(oxs.gradient_rule(high_factor=high_factor, low_factor=1.0))
    return oxs.observe(optax.chain(inner, optax.scale_by_rms(), rules))


def whole_chain(labels: PyTree, masks: PyTree, learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """The chain of the README."""
    return oxs.sparse(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            oxs.per_leaf(optax.scale_by_adam()),
            oxs.scale_by_label({"scaffold": 0.1, "new": optax.linear_schedule(0.0, 1.0, 2)}, labels),
            oxs.scale_by_connection(oxs.component_rule(patch=2.0)),
            optax.scale_by_learning_rate(learning_rate),
        ),
        masks,
    )


def scale_by_loss_phase(
    scales: Any = (1.0, 0.5), *, rule: Any = oxs.loss_phase, every: Any = 1, window: Any = 2
) -> Any:
    """With a window that is full after two updates: a shape, and no number that could be injected."""
    return oxs.scale_by_loss_phase(scales, rule=rule, every=every, window=window)


def freeze_at_phase(
    inner: optax.GradientTransformation, phases: Any, depths: PyTree, *, phase: Any = 1
) -> optax.GradientTransformation:
    """Its second phase: a structure is no number that could be injected."""
    return oxs.freeze_at_phase(inner, phases, depths, phase=phase)


# That freezes at the first reading.
freeze_on_small_gradients = functools.partial(oxs.freeze_on_small_gradients, min_steps=0, patience=1)
freeze_on_small_gradients.__name__ = "freeze_on_small_gradients"  # pyright: ignore[reportAttributeAccessIssue]


def freeze_elements(
    inner: optax.GradientTransformation, threshold: float, decay: float = 0.9, max_share: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    return freeze_on_small_gradients(inner, threshold, decay=decay, max_share=max_share, per="element")


def freeze_layers(
    inner: optax.GradientTransformation, threshold: float, groups: Any = None, max_share: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Whole layers, each leaf with an optimizer of its own, which starts again."""
    return freeze_on_small_gradients(
        oxs.per_leaf(inner), threshold, decay=0.5, max_share=max_share, groups=groups, moments="reset"
    )


EXTREMA = oxs.Extrema({"hidden": jnp.arange(6) < 1}, {"hidden": jnp.arange(6) == 5})


def product(
    labels: PyTree,
    depths: PyTree,
    scaffold: float = 0.5,
    new: float | optax.Schedule = 1.0,
    decay: float = 0.5,
    min_scale: float = 0.0,
    max_scale: float = 10.0,
) -> optax.GradientTransformationExtraArgs:
    """Scalars of several kinds, and a factor for every connection."""
    return oxs.scale_by_product(
        oxs.scale_by_label({"scaffold": scaffold, "new": new}, labels),
        oxs.scale_by_depth(decay, depths),
        oxs.scale_by_connection(oxs.component_rule(patch=2.0)),
        min_scale=min_scale,
        max_scale=max_scale,
    )


SHARED = ("learning_rate", "labels", "depths", "steps_per_epoch", "inner", "bounds")
"""Arguments of all presets; the others are the numbers of one."""

KEPT = {
    "patches": 1.0,
    "strata_ages": (100.0, 20.0),
    "momentum": 0.9,
    "lr_rules": {},
    "momentum_rules": {},
    "dynamic_weights": False,
    "freeze_ema_beta": 0.9,
    "min_steps_before_freeze": 100,
    "max_share": 1.0,
}
"""What of these cannot be None."""


def preset_row(name: str) -> Row:
    """A preset as a wrapper around an optimizer, which is turned round: with a rate of its own it would be refused."""
    preset = getattr(oxs.presets, name)

    def factory(inner: optax.GradientTransformation, learning_rate: float, **given: Any) -> Any:
        given = {"steps_per_epoch": 2} | given  # a length, and no number that could be injected
        try:
            return preset(learning_rate, inner=optax.chain(inner, optax.scale(-1.0)), **given)
        except ValueError as error:
            if "already applies a learning rate" not in str(error):
                raise
            return preset(learning_rate, inner=inner, **given)

    # optax.inject_hyperparams reads names and defaults here.
    shown = dict(inspect.signature(preset).parameters)
    first = shown.pop("inner").replace(kind=inspect.Parameter.POSITIONAL_ONLY, default=inspect.Parameter.empty)
    shown["steps_per_epoch"] = shown["steps_per_epoch"].replace(default=2)
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown.values()]
    factory.__signature__ = inspect.Signature([first, *keywords])  # pyright: ignore[reportFunctionMemberAccess]
    factory.__name__ = name

    def arguments(params: PyTree) -> dict[str, Any]:
        return {"learning_rate": 0.5, "labels": labels(params), "depths": depths(params)}

    off = {n: KEPT.get(n) for n in inspect.signature(preset).parameters if n not in SHARED}
    freezes = "rates" in off
    return Row(
        name=f"presets.{name}",
        factory=factory,
        arguments=arguments,
        extra=lambda p: {"value": jnp.asarray(1.0), "event": jnp.asarray(True), "extrema": EXTREMA},
        needs=("value",) if name == "loss_aware" else (),
        across_leaves=name == "loss_aware",
        wraps=True,
        slow=True,
        neutral=lambda p: {"learning_rate": 1.0, "labels": labels(p), "bounds": None, **off},
        frozen=(lambda p: arguments(p) | {"rates": {"scaffold": 0.0}}) if freezes else None,
        frozen_where=labelled("scaffold"),
        bad=(
            ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
            ({"steps_per_epoch": 0}, "steps_per_epoch=0 must be an int >= 1"),
            ({"bounds": (-1.0, 1.0)}, r"min_scale=-1\.0"),
        ),
    )


WARMUP = optax.linear_schedule(0.25, 1.0, 2)


def one(x: jax.Array) -> jax.Array:
    return jnp.ones_like(x, jnp.float32)


def zero(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, jnp.float32)


def with_loss(params: PyTree) -> dict[str, Any]:
    del params
    return {"value": jnp.asarray(1.0)}


def with_loss_and_grads(params: PyTree) -> dict[str, Any]:
    return {"value": jnp.asarray(1.0), "grads": jax.tree.map(jnp.ones_like, params)}


def feedback_sgd(
    inner: optax.GradientTransformation, *, learning_rate: float = 0.1, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """After an optimizer whose updates it takes for gradients."""
    return optax.chain(inner, oxs.feedback_sgd(learning_rate, momentum=momentum))


def feedback_adam(
    inner: optax.GradientTransformation, *, learning_rate: float = 0.1, weight_decay: float = 0.1
) -> optax.GradientTransformationExtraArgs:
    return optax.chain(inner, oxs.feedback_adam(learning_rate, weight_decay=weight_decay))


def accumulate_gradients(
    inner: optax.GradientTransformation, every: Any = 2, losses: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Two gradients an update: a length, and no number that could be injected."""
    return oxs.accumulate_gradients(inner, every, losses=losses)


ROWS = (
    Row(
        name="scale_by_label",
        factory=oxs.scale_by_label,
        arguments=lambda p: {"scales": {"scaffold": 0.1, "new": 2.0}, "labels": labels(p)},
        neutral=lambda p: {"scales": {"scaffold": 1.0, "new": 1.0}, "labels": labels(p)},
        frozen=lambda p: {"scales": {"scaffold": 0.0, "new": 1.0}, "labels": labels(p)},
        frozen_where=labelled("scaffold"),
        bad=(
            ({"scales": {"scaffold": -1.0, "new": 1.0}}, r"scales\['scaffold'\]=-1\.0"),
            ({"scales": {"scaffold": 1.0, "new": float("nan")}}, r"scales\['new'\]=nan"),
            ({"scales": {"scaffold": 1.0}}, r"labels \['new'\] have no scale.*\['scaffold'\]"),
        ),
    ),
    Row(
        name="scale_by_label_schedule",
        slow=True,
        factory=oxs.scale_by_label,
        arguments=lambda p: {"scales": {"scaffold": 0.1, "new": WARMUP}, "labels": labels(p)},
        neutral=lambda p: {"scales": {"scaffold": one, "new": one}, "labels": labels(p)},
        frozen=lambda p: {"scales": {"scaffold": zero, "new": WARMUP}, "labels": labels(p)},
        frozen_where=labelled("scaffold"),
    ),
    Row(
        name="scale_by_depth",
        factory=oxs.scale_by_depth,
        arguments=lambda p: {"decay": 0.5, "depths": depths(p), "min_scale": 0.1},
        neutral=lambda p: {"decay": 1.0, "depths": depths(p)},
        frozen=lambda p: {"decay": 0.0, "depths": depths(p)},
        frozen_where=lambda p: jax.tree.map(lambda depth: depth == 0, depths(p)),
        bad=(
            ({"decay": 1.5}, r"decay=1\.5"),
            ({"decay": -0.5}, r"decay=-0\.5"),
            ({"min_scale": 2.0}, r"min_scale=2\.0"),
            ({"protect": "middle"}, "protect='middle'"),
            ({"depths": {"body": 0, "head": 1}}, "depths does not have the structure of params"),
            ({"depths": {"hidden": -1, "head": 0}}, r"depths.*-1"),
        ),
    ),
    Row(
        name="scale_by_depth_late",
        slow=True,
        factory=oxs.scale_by_depth,
        arguments=lambda p: {"decay": 0.5, "depths": depths(p), "protect": "late", "within": labels(p)},
        neutral=lambda p: {"decay": 1.0, "depths": depths(p), "protect": "late"},
        frozen=lambda p: {"decay": 0.0, "depths": depths(p), "protect": "late"},
        frozen_where=lambda p: jax.tree.map(lambda depth: depth > 0, depths(p)),
    ),
    Row(
        name="scale_by_age",
        factory=oxs.scale_by_age,
        arguments=lambda p: {"schedule": WARMUP},
        neutral=lambda p: {"schedule": one},
        frozen=lambda p: {"schedule": zero},
        bad=(({"schedule": 0.5}, r"schedule=0\.5"), ({"unit": "epochs"}, "unit='epochs'")),
    ),
    Row(
        name="scale_by_age_events",
        slow=True,
        factory=oxs.scale_by_age,
        arguments=lambda p: {"schedule": WARMUP, "unit": "events"},
        extra=lambda p: {"event": jnp.asarray(True)},
        needs=("event",),
        neutral=lambda p: {"schedule": one, "unit": "events"},
    ),
    Row(
        name="scale_by_density",
        factory=oxs.scale_by_density,
        arguments=lambda p: {"fn": lambda density: 0.5 + density},
        extra=with_masks,
        needs=("masks",),
        neutral=lambda p: {"fn": one},
        frozen=lambda p: {"fn": zero},
        frozen_where=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p),
        bad=(({"fn": 2.0}, r"fn=2\.0"), ({"per": "layer"}, "per='layer'")),
    ),
    Row(
        name="scale_by_density_unit",
        slow=True,
        factory=oxs.scale_by_density,
        arguments=lambda p: {"fn": lambda density: 0.5 + density, "per": "unit"},
        extra=with_masks,
        needs=("masks",),
        neutral=lambda p: {"fn": one, "per": "unit"},
    ),
    Row(
        name="scale_by_connection",
        factory=connection,
        arguments=lambda p: {"scaffold": 0.5, "patch": 2.0, "schedule": WARMUP},
        extra=with_changed_masks,
        neutral=lambda p: {"schedule": one},
        neutral_extra=with_full_masks,
        frozen=nothing,
        frozen_where=off_mask,
        bad=(({"scaffold": -1.0}, r"scaffold=-1\.0"), ({"schedule": 3}, "schedule=3")),
    ),
    Row(
        name="scale_by_connection_component",
        slow=True,
        factory=connection,
        arguments=lambda p: {"scaffold": 0.5},
        neutral=lambda p: {"scaffold": 1.0},
        frozen=lambda p: {"scaffold": 0.0},
    ),
    Row(
        name="scale_by_connection_none",
        slow=True,
        factory=oxs.scale_by_connection,
        neutral=nothing,
    ),
    Row(
        name="scale_by_connection_age",
        factory=oxs.scale_by_connection_age,
        arguments=lambda p: {"schedule": WARMUP},
        extra=with_masks,
        neutral=lambda p: {"schedule": one},
        neutral_extra=with_full_masks,
        frozen=lambda p: {"schedule": zero},
        bad=(({"schedule": 0.5}, r"schedule=0\.5"),),
    ),
    Row(
        name="scale_by_connection_elements",
        factory=elements,
        arguments=lambda p: {
            "units": kernel_units(p),
            "depths": depths(p),
            "strong_factor": 0.5,
            "high_factor": 0.5,
            "fine": 4.0,
            "boost": 2.0,
        },
        extra=with_moments_and_extrema,
        needs=("second_moment", "extrema"),
        neutral=lambda p: {"units": kernel_units(p), "depths": depths(p)},
        frozen=lambda p: {"units": kernel_units(p), "depths": depths(p), "fine": 0.0},
        frozen_where=lambda p: jax.tree.map(lambda leaf, depth: leaf.ndim > 1 and depth > 0, p, depths(p)),
        bad=(
            ({"strong_factor": -1.0}, r"strong_factor=-1\.0"),
            ({"high_factor": -1.0}, r"high_factor=-1\.0"),
            ({"fine": -1.0}, r"fine=-1\.0"),
            ({"boost": -1.0}, r"boost=-1\.0"),
            ({"units": 3}, "units=3"),
            ({"depths": {"hidden": -1, "head": 0}}, r"depths.*-1"),
        ),
    ),
    Row(
        name="mask_gradients",
        factory=oxs.mask_gradients,
        extra=with_masks,
        needs=("masks",),
        first=True,
        neutral=nothing,
        neutral_extra=with_full_masks,
    ),
    Row(
        name="keep_masked",
        factory=oxs.keep_masked,
        extra=with_masks,
        needs=("masks",),
        neutral=nothing,
        neutral_extra=with_full_masks,
        frozen=nothing,
        frozen_where=off_mask,
    ),
    Row(
        name="sparse",
        factory=oxs.sparse,
        wraps=True,
        arguments=lambda p: {"masks": masks(p)},
        neutral=lambda p: {"masks": full_masks(p)},
        frozen=lambda p: {"masks": masks},
        frozen_where=off_mask,
    ),
    Row(
        name="sparse_rewired",
        slow=True,
        factory=oxs.sparse,
        wraps=True,
        arguments=lambda p: {"masks": masks(p), "rewire": oxs.rigl_rewiring(every=3, accumulate=2)},
        bad=(({"rewire": oxs.set_rewiring}, "must be a rule"),),
    ),
    Row(
        name="sparse_pruned",
        slow=True,
        factory=oxs.sparse,
        wraps=True,
        arguments=lambda p: {"masks": full_masks(p), "rewire": oxs.magnitude_pruning(0.5, every=1, stop=2)},
    ),
    Row(name="observe", factory=oxs.observe, wraps=True, neutral=nothing),
    Row(
        name="observe_with_a_rule",
        slow=True,
        factory=observed,
        wraps=True,
        arguments=lambda p: {"high_factor": 0.5},
    ),
    Row(name="per_leaf", factory=oxs.per_leaf, wraps=True, neutral=nothing),
    Row(
        name="whole_chain",
        factory=whole_chain,
        arguments=lambda p: {"labels": labels(p), "masks": masks(p), "learning_rate": 1e-2},
        frozen=lambda p: {"labels": labels(p), "masks": masks(p), "learning_rate": 1e-2},
        frozen_where=off_mask,
        across_leaves=True,
    ),
    Row(
        name="scale_by_depth_profile",
        factory=oxs.scale_by_depth_profile,
        arguments=lambda p: {"profile": lambda x: 0.1 + 0.9 * x, "depths": depths(p)},
        neutral=lambda p: {"profile": lambda x: 1.0, "depths": depths(p)},
        frozen=lambda p: {"profile": lambda x: x, "depths": depths(p)},
        frozen_where=lambda p: jax.tree.map(lambda depth: depth == 0, depths(p)),
        bad=(
            ({"profile": 0.5}, r"profile=0\.5"),
            ({"profile": lambda x: x - 1.0}, r"profile\(0\.0\)=-1\.0"),
            ({"depths": {"body": 0, "head": 1}}, "depths does not have the structure of params"),
            ({"depths": {"hidden": -1, "head": 0}}, r"depths.*-1"),
        ),
    ),
    Row(
        name="scale_by_depth_bands",
        factory=oxs.scale_by_depth_bands,
        arguments=lambda p: {"early": 0.5, "middle": 1.0, "late": WARMUP, "depths": depths(p)},
        neutral=lambda p: {"early": 1.0, "middle": 1.0, "late": 1.0, "depths": depths(p)},
        frozen=lambda p: {"early": 0.0, "middle": 1.0, "late": 2.0, "depths": depths(p)},
        frozen_where=lambda p: jax.tree.map(lambda depth: depth == 0, depths(p)),
        bad=(
            ({"early": -1.0}, r"early=-1\.0"),
            ({"middle": float("nan")}, "middle=nan"),
            ({"depths": {"body": 0, "head": 1}}, "depths does not have the structure of params"),
            ({"depths": {"hidden": -1, "head": 0}}, r"depths.*-1"),
        ),
    ),
    Row(
        name="scale_by_masked_trust_ratio",
        factory=oxs.scale_by_masked_trust_ratio,
        arguments=lambda p: {"trust_coefficient": 0.5, "eps": 1e-6, "max_ratio": 10.0},
        extra=with_masks,
        neutral=lambda p: {"trust_coefficient": 1e30, "max_ratio": 1.0},
        bad=(
            ({"trust_coefficient": -1.0}, r"trust_coefficient=-1\.0"),
            ({"eps": -1.0}, r"eps=-1\.0"),
            ({"max_ratio": -1.0}, r"max_ratio=-1\.0"),
        ),
    ),
    Row(
        name="scale_on_event",
        factory=oxs.scale_on_event,
        arguments=lambda p: {"factors": {"scaffold": 0.5}, "labels": labels(p), "min_scale": 0.2, "recovery": 5.0},
        extra=lambda p: {"event": jnp.asarray(True)},
        needs=("event",),
        neutral=lambda p: {"factors": {"scaffold": 1.0}, "labels": labels(p)},
        frozen=lambda p: {"factors": {"scaffold": 0.0}, "labels": labels(p), "min_scale": 0.0},
        frozen_where=labelled("scaffold"),
        bad=(
            ({"factors": {"scaffold": -1.0}}, r"factors\['scaffold'\]=-1\.0"),
            ({"factors": {"scaffold": 1.5}}, r"factors\['scaffold'\]=1\.5 must lie in \[0\.0, 1\.0\]"),
            ({"factors": {}}, "factors={}"),
            ({"factors": [0.9]}, "labels are given, but factors are by distance"),
            ({"labels": None}, "labels are missing"),
            ({"min_scale": 2.0}, r"min_scale=2\.0"),
            ({"recovery": 0.0}, r"recovery=0\.0"),
        ),
    ),
    Row(
        name="scale_on_event_distances",
        slow=True,
        factory=oxs.scale_on_event,
        arguments=lambda p: {"factors": (0.5, 0.25), "min_scale": 0.2},
        extra=lambda p: {"event": jax.tree.map(lambda depth: jnp.asarray(depth - 1, jnp.int32), depths(p))},
        needs=("event",),
        neutral=lambda p: {"factors": (1.0,)},
        bad=(({"factors": [1.0, -0.5]}, r"factors\[1\]=-0\.5"),),
    ),
    Row(
        name="strata",
        factory=oxs.strata,
        arguments=lambda p: {"active": 0.5, "sediment_age": 1},
        neutral=lambda p: {"labels": "active"},
        frozen=lambda p: {"labels": "patch", "patches": 0.0},
        bad=(
            ({"sediment": -1.0}, r"sediment=-1\.0"),
            ({"patches": float("nan")}, "patches=nan"),
            ({"sediment_age": -1}, "sediment_age=-1"),
            ({"geological_age": 10, "sediment_age": 20}, r"geological_age=10 must lie in \[20"),
        ),
    ),
    Row(
        name="scale_by_extrema_phase",
        factory=oxs.scale_by_extrema_phase,
        arguments=lambda p: {"explosive": 0.5, "steady": 0.1, "scales": (1.0, 0.5, 0.25), "hysteresis": 0.2},
        extra=lambda p: {"extrema": EXTREMA},
        needs=("extrema",),
        neutral=lambda p: {"scales": (1.0, 1.0, 1.0)},
        frozen=lambda p: {"explosive": 0.5, "steady": 0.1, "scales": (1.0, 0.0, 1.0)},
        bad=(
            ({"explosive": 1.5}, r"explosive=1\.5"),
            ({"steady": 0.6}, r"steady=0\.6.*0\.5"),
            ({"hysteresis": 1.0}, r"hysteresis=1\.0"),
            ({"hysteresis": -0.1}, r"hysteresis=-0\.1"),
            ({"scales": (1.0, 0.1)}, r"scales=\(1\.0, 0\.1\) must be 3 numbers"),
            ({"scales": (1.0, -0.1, 0.1)}, r"scales\[1\]=-0\.1"),
        ),
    ),
    Row(
        name="scale_by_loss_phase",
        factory=scale_by_loss_phase,
        arguments=lambda p: {"scales": (1.0, 0.5, 0.25, 0.125), "every": 1},
        extra=lambda p: {"value": jnp.asarray(1.0), "grads": jax.tree.map(jnp.ones_like, p), "extrema": EXTREMA},
        needs=("value",),
        neutral=lambda p: {"scales": (1.0, 1.0, 1.0), "every": 1},
        frozen=lambda p: {"scales": (0.0,), "every": 1},
        bad=(
            ({"scales": ()}, r"scales=\(\)"),
            ({"scales": (1.0, -0.5)}, r"scales\[1\]=-0\.5"),
            ({"rule": 0.5}, r"rule=0\.5 must be a function"),
            ({"rule": lambda signals, phase: signals.improvement}, "must return the phase.*float32"),
            ({"rule": functools.partial(oxs.loss_phase, thresholds=(0.1, 0.2))}, r"thresholds=\(0\.1, 0\.2\)"),
            ({"rule": functools.partial(oxs.loss_phase, noisy=-1.0)}, r"noisy=-1\.0"),
            ({"rule": functools.partial(oxs.loss_phase, extreme=2.0)}, r"extreme=2\.0"),
            ({"every": 0}, "every=0"),
            ({"window": 1}, "window=1"),
            ({"window": 2.5}, r"window=2\.5"),
        ),
    ),
    Row(
        name="progressive_freezing",
        factory=oxs.progressive_freezing,
        arguments=lambda p: {
            "phases": [(0, 1.0), (1, (0.1, 0.5)), (2, oxs.frozen_below(-1, 0.5))],
            "depths": depths(p),
        },
        neutral=lambda p: {"phases": [(0, 1.0), (2, (1.0, 1.0))], "depths": depths(p)},
        frozen=lambda p: {"phases": [(0, oxs.frozen_below(1)), (1, (0.0, 0.5))], "depths": depths(p)},
        frozen_where=lambda p: jax.tree.map(lambda depth: depth == 0, depths(p)),
        bad=(
            ({"phases": []}, r"phases start at \[\]"),
            ({"phases": [(1, 1.0)]}, r"phases start at \[1\]; the first must start at 0"),
            ({"phases": [(0, 1.0), (5, 0.5), (5, 0.1)]}, r"phases start at \[0, 5, 5\]"),
            ({"phases": [(0, 1.0, 2.0)]}, r"must be pairs \(start, scales\)"),
            ({"phases": [(0, 1.0), (0.5, 0.1)]}, r"phases\[1\]\.start=0\.5 must be an int"),
            ({"phases": [(0, "0.5")]}, r"phases\[0\]\.scales='0\.5' must be a number, a tuple of numbers"),
            ({"phases": [(0, ("a", 1.0))]}, r"phases\[0\]\.scales=\('a', 1\.0\) must be a number"),
            ({"phases": [(0, jnp.ones(2))]}, r"phases\[0\]\.scales=Array.* must be a number"),
            (
                {"phases": [(0, 1.0), (5, oxs.frozen_below(9))]},
                r"phases\[1\]\.scales freezes all layers: .* depth is 1",
            ),
            ({"depths": {"hidden": 0.5, "head": 1}}, r"depths must be ints .* got 0\.5"),
            ({"phases": [(0, -1.0)]}, r"phases\[0\]\.scales=-1\.0"),
            ({"phases": [(0, (1.0, -0.5))]}, r"phases\[0\]\.scales=-0\.5"),
            ({"phases": [(0, ())]}, r"phases\[0\]\.scales=\(\) must not be empty"),
            ({"phases": [(0, lambda depth, last: depth - 1.0)]}, r"scales\(0, 1\)=-1\.0"),
            ({"depths": {"hidden": -1, "head": 0}}, r"depths.*-1"),
        ),
    ),
    Row(
        name="scale_by_freezeout",
        slow=True,
        factory=oxs.scale_by_freezeout,
        arguments=lambda p: {"total_steps": 4, "depths": depths(p), "first": 0.3, "power": 2.0},
        bad=(
            ({"total_steps": 0}, "total_steps=0"),
            ({"first": 0.0}, r"first=0\.0 must be above 0"),
            ({"first": 1.5}, r"first=1\.5"),
            ({"power": 0.5}, r"power=0\.5"),
            ({"depths": {"hidden": -1, "head": 0}}, r"depths.*-1"),
        ),
    ),
    Row(
        name="freeze_labels",
        factory=oxs.freeze_labels,
        wraps=True,
        hides=True,
        arguments=lambda p: {"frozen": "scaffold", "labels": labels(p)},
        neutral=lambda p: {"frozen": (), "labels": labels(p)},
        frozen=lambda p: {"frozen": ("scaffold",), "labels": labels},
        frozen_where=labelled("scaffold"),
        bad=(({"frozen": ("scaffold", "old")}, r"frozen=\['old'\].*\['new', 'scaffold'\]"),),
    ),
    Row(
        name="freeze_at_phase",
        slow=True,
        factory=freeze_at_phase,
        wraps=True,
        hides=True,
        arguments=lambda p: {"phases": [(0, 1.0), (1, (0.0, 0.5))], "depths": depths(p)},
        neutral=lambda p: {"phases": [(0, 0.5), (1, 1.0)], "depths": depths(p)},
        frozen=lambda p: {"phases": [(0, 1.0), (1, oxs.frozen_below(-1, 0.5))], "depths": depths(p)},
        frozen_where=lambda p: jax.tree.map(lambda depth: depth == 0, depths(p)),
        bad=(
            ({"phase": 2}, r"phase=2 must be one of 0 \.\. 1"),
            ({"phase": -1}, r"phase=-1"),
            ({"phases": [(3, 1.0)]}, r"phases start at \[3\]"),
        ),
    ),
    Row(
        name="clip_by_global_norm",
        slow=True,
        factory=oxs.clip_by_global_norm,
        arguments=lambda p: {"max_norm": 0.5, "frozen": "scaffold", "labels": labels(p)},
        extra=lambda p: {"observed": True},
        first=True,
        neutral=lambda p: {"max_norm": 1e30},
        across_leaves=True,
        bad=(
            ({"max_norm": 0.0}, r"max_norm=0\.0"),
            ({"labels": None}, r"frozen=\['scaffold'\] are labels: pass labels="),
            ({"frozen": "old"}, r"frozen=\['old'\] are labels of no leaf"),
        ),
    ),
    Row(
        name="skip_unobserved",
        slow=True,
        factory=oxs.skip_unobserved,
        wraps=True,
        extra=lambda p: {"observed": jax.tree.map(lambda label: jnp.asarray(label == "new"), labels(p))},
        neutral=nothing,
        neutral_extra=nothing,
        frozen=nothing,
        frozen_where=labelled("scaffold"),
    ),
    Row(
        name="freeze_on_small_gradients",
        factory=freeze_on_small_gradients,
        wraps=True,
        arguments=lambda p: {"threshold": 0.8, "decay": 0.5, "release": 1.1, "max_share": 0.9},
        extra=lambda p: {"value": jnp.asarray(1.0)},
        neutral=lambda p: {"threshold": 0.0},
        across_leaves=True,
        bad=(
            ({"threshold": -1.0}, r"threshold=-1\.0"),
            ({"decay": 1.0}, r"decay=1\.0 must be below 1"),
            ({"min_steps": -1}, "min_steps=-1"),
            ({"patience": 0}, r"patience=0 must lie in \[1"),
            ({"release": 0.5}, r"release=0\.5 must lie in \[1"),
            ({"min_dwell": -1}, "min_dwell=-1"),
            ({"max_share": 1.5}, r"max_share=1\.5"),
            ({"per": "layer"}, "per='layer'"),
            ({"per": "element", "groups": 0}, "groups= are of whole leaves"),
            ({"moments": "lose"}, "moments='lose'"),
            ({"probe_every": 0}, "probe_every=0"),
            ({"alarm": -1.0}, r"alarm=-1\.0"),
        ),
    ),
    Row(
        name="freeze_on_small_gradients_by_element",
        slow=True,
        factory=freeze_elements,
        wraps=True,
        arguments=lambda p: {"threshold": 0.5, "decay": 0.5, "max_share": 0.5},
        neutral=lambda p: {"threshold": 0.0},
    ),
    Row(
        name="freeze_on_small_gradients_per_layer",
        slow=True,
        factory=freeze_layers,
        wraps=True,
        arguments=lambda p: {"threshold": 0.8, "groups": depths(p), "max_share": 0.7},
        neutral=lambda p: {"threshold": 0.0},
        across_leaves=True,
    ),
    Row(
        name="scale_by_product",
        factory=product,
        arguments=lambda p: {
            "labels": labels(p),
            "depths": depths(p),
            "decay": 0.5,
            "min_scale": 0.1,
            "max_scale": 0.6,
        },
        extra=with_masks,
        neutral=lambda p: {"labels": labels(p), "depths": depths(p), "scaffold": 1.0, "decay": 1.0},
        neutral_extra=with_full_masks,
        frozen=lambda p: {"labels": labels(p), "depths": depths(p), "scaffold": 0.0, "min_scale": 0.5},
        frozen_where=labelled("scaffold"),
        bad=(({"min_scale": -1.0}, r"min_scale=-1\.0"), ({"min_scale": 0.7}, r"max_scale=0\.6 must lie in \[0\.7")),
    ),
    Row(
        name="scale_by_feedback",
        factory=oxs.scale_by_feedback,
        arguments=lambda p: {"min_scale": 0.25, "max_scale": 2.0, "smooth": 0.5, "smooth_down": 0.25, "total_steps": 9},
        extra=with_loss,
        needs=("value",),
        neutral=lambda p: {"lr_rules": {}},
        bad=(
            ({"lr_rules": {"trends": 1.0}}, r"names the rule 'trends'; the rules are \['cyclical'"),
            ({"lr_rules": {"trend": -1.0}}, r"lr_rules\['trend'\]=-1\.0"),
            ({"total_steps": 0}, "total_steps=0"),
            ({"min_scale": 0.0}, r"min_scale=0\.0"),
            ({"max_scale": 0.1}, r"max_scale=0\.1 must lie in \[0\.25"),
            ({"smooth": 1.0}, r"smooth=1\.0"),
            ({"smooth_down": -0.5}, r"smooth_down=-0\.5"),
            ({"per_label": True}, "per_label=True with labels=None"),
        ),
    ),
    Row(
        name="scale_by_feedback_all_rules",
        slow=True,
        factory=oxs.scale_by_feedback,
        arguments=lambda p: {
            "lr_rules": dict.fromkeys(("trend", "variance", "grad_norm", "cyclical", "hypergradient"), 1.0)
        },
        extra=with_loss_and_grads,
        needs=("value", "grads"),
        across_leaves=True,
    ),
    Row(
        name="scale_by_feedback_per_label",
        slow=True,
        factory=lambda labels, min_scale=0.1: oxs.scale_by_feedback(per_label=True, labels=labels, min_scale=min_scale),
        arguments=lambda p: {"labels": labels(p), "min_scale": 0.2},
        extra=with_loss_and_grads,
        needs=("value",),
    ),
    Row(
        name="feedback_sgd",
        slow=True,
        factory=feedback_sgd,
        wraps=True,
        arguments=lambda p: {"learning_rate": 0.5, "momentum": 0.8},
        extra=with_loss,
        needs=("value",),
        across_leaves=True,
        bad=(
            ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
            ({"momentum": 0.99}, r"momentum=0\.99 must lie in \[0\.5, 0\.98\]"),
        ),
    ),
    Row(
        name="feedback_adam",
        slow=True,
        factory=feedback_adam,
        wraps=True,
        arguments=lambda p: {"learning_rate": 0.5, "weight_decay": 0.01},
        extra=with_loss,
        needs=("value",),
        across_leaves=True,
        bad=(({"weight_decay": -1.0}, r"weight_decay=-1\.0"),),
    ),
    Row(
        name="accumulate_gradients",
        slow=True,
        factory=accumulate_gradients,
        wraps=True,
        extra=with_loss,
        neutral=lambda p: {"every": 1},
        bad=(({"every": 0}, "every=0"), ({"every": 0.5}, r"every=0\.5")),
    ),
    *map(preset_row, oxs.presets.__all__),
)
BY_NAME = {row.name: row for row in ROWS}
