"""A loss-aware rate for any optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align, is_function
from optax_structure.labels import Labels
from optax_structure.transforms._extra import Rule, require
from optax_structure.transforms._multiplier import Factors, Multiplier, every_leaf, multiplier
from optax_structure.transforms.feedback._control import DEFAULT_RATE, Control, FeedbackState, LastUpdate, Numbers
from optax_structure.transforms.feedback._control_step import cosine, dot, flags_of, number
from optax_structure.transforms.feedback.rules import RATE_RULES, RuleWeights, weighted_rules

_BY_RULE = ("lr_memory", "momentum_memory", "lr_weights", "momentum_weights")


def _parted(state: FeedbackState, names: Sequence[str]) -> FeedbackState:
    """The state of vectors over labels by name instead: so each label finds its own again after a relabelling."""
    fields = {field: value for field, value in state._asdict().items() if value is not None}
    for field, value in fields.items():
        if field in _BY_RULE:
            fields[field] = {f"{rule}/{name}": of[i] for rule, of in value.items() for i, name in enumerate(names)}
        else:
            fields[field] = {f"{field}/{name}": value[i] for i, name in enumerate(names)}
    return state._replace(**fields)


def _joined(state: FeedbackState, names: Sequence[str], rules: Sequence[str]) -> FeedbackState:
    """The state by label as one of vectors, in the order of ``names``."""
    fields = {field: value for field, value in state._asdict().items() if value}
    for field, value in fields.items():
        if field in _BY_RULE:
            keys = [f"{field}/{rule}" for rule in rules]
            fields[field] = {key: jnp.stack([value[f"{key}/{name}"] for name in names]) for key in keys}
        else:
            fields[field] = jnp.stack([value[f"{field}/{name}"] for name in names])
    return state._replace(**fields)


def scale_by_feedback(
    *,
    lr_rules: RuleWeights | None = None,
    dynamic_weights: bool = True,
    total_steps: int | None = None,
    min_scale: float = 0.1,
    max_scale: float = 3.0,
    smooth: float = 0.98,
    smooth_down: float = 0.5,
    loss: str | None = None,
    per_label: bool = False,
    labels: Labels | None = None,
) -> Multiplier:
    """Multiply every update by a factor that follows the loss: a loss-aware rate for any optimizer.

    Every rule of ``lr_rules`` says the logarithm of a factor. Their weighted mean is clipped to ``[min_scale,
    max_scale]`` and followed by the factor ``f``: ``log f <- log f + (1 - s) (goal - log f)`` with ``s = smooth``
    upwards and ``s = smooth_down`` downwards. It begins at ``min_scale``: this is a warm-up of about ``1 / (1 -
    smooth)`` steps, in which the loop sees the loss react before the rate is where it may be too high.

    =================  ===============================================================================================
    rule               what it does (see its function for the numbers)
    =================  ===============================================================================================
    ``trend``          raises while the loss falls, lowers while it rises, and at once when it jumps (``trend_rate``)
    ``variance``       lowers while the loss is noisy (``variance_rate``)
    ``grad_norm``      lowers where the gradient is longer than usual (``grad_norm_rate``)
    ``cyclical``       cosine cycles (``cyclical_rate``)
    ``hypergradient``  raises while successive steps agree (``hypergradient_rate``)
    =================  ===============================================================================================

    A rule of one's own is a function ``(FeedbackSignals, memory) -> (log factor, memory)``. ``grad_norm`` reads the raw
    gradient, which a member of a chain cannot see: wrap the whole optimizer in ``observe``, or pass ``grads=``, or
    ``grad_norm=``. The default rules do without: then the weight of ``grad_norm`` goes to the others.

    With ``total_steps`` and ``dynamic_weights`` each weight is multiplied by its time, at the progress ``p``:
    ``variance`` and ``grad_norm`` by ``(1 - p)^2``, ``trend`` and ``hypergradient`` by ``2 p (1 - p)``, ``cyclical``
    by ``p^2``, one's own by 1/3, each plus 0.05.

    At a step whose loss (or gradient norm) is not finite the update is exactly 0, the statistics stay, and ``skipped``
    counts it. The optimizer before this one has seen the gradient by then: where that is not finite as well, use
    ``optax.apply_if_finite`` around both, or ``feedback_sgd`` and ``feedback_adam``, which skip it themselves.

    The loss is the one that the gradient is of, without loss scaling. Over accumulated gradients it is the mean of the
    window, which ``accumulate_gradients`` passes and ``optax.MultiSteps`` does not.

    Args:
      lr_rules: rule -> weight >= 0; weights are normalised. None: ``{"trend": 0.6, "variance": 0.3, "grad_norm":
        0.1}``; ``{}``: the factor stays 1.
      dynamic_weights: whether the weights change with the progress; without ``total_steps`` they do not.
      total_steps: updates of the whole run, >= 1.
      min_scale: lower bound of the factor, > 0.
      max_scale: upper bound.
      smooth: in [0, 1); 0 follows at once.
      smooth_down: the same downwards.
      loss: which entry is read where ``value=`` is a mapping: for use inside ``optax.partition``, a loss for each part.
      per_label: each label has its own statistics, gradient norm and factor; ``value=`` is a scalar for all, or a
        mapping label -> loss.
      labels: for ``per_label``: tree of labels with the structure of params, or a prefix of it.

    Returns:
      A transformation that reads ``value=`` (the loss), and ``grads=``, ``grad_norm=`` and ``observed=`` where passed.
      ``observed`` is a tree of bools, a prefix, or one bool: which leaves' gradients were computed; norms leave the
      others out.

    Raises:
      ValueError: for unknown rules, rules that read ``progress`` without ``total_steps``, numbers out of range, labels
        missing or given in vain; in ``update`` for a missing ``value=`` or one that is no scalar, and for missing
        ``grads=`` where a rule that was asked for reads them.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.observe(optax.chain(optax.adam(1e-3), oxs.scale_by_feedback(total_steps=1000)))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params, value=jnp.asarray(0.7))

    References:
      Bernstein, 1912 (the polynomials); Baydin et al., 2018 (hypergradient).
    """
    numbers = Numbers(dynamic_weights, total_steps, min_scale, max_scale, smooth, smooth_down)
    rules = weighted_rules("lr_rules", DEFAULT_RATE if lr_rules is None else lr_rules, RATE_RULES)
    loop = Control(rules, (), numbers, optional=frozenset({"grad_norm"} if lr_rules is None else ())).check()
    if per_label != (labels is not None) or is_function(labels):
        raise ValueError(
            f"per_label={per_label!r} with labels={'None' if labels is None else 'given'}: pass both, the labels as a "
            "tree (labels=label_fn(params)): the state has an entry for each."
        )
    # Without a leaf (an empty group) there is still one loop, that of no label.
    names: Sequence[Any] = (sorted(set(jax.tree.leaves(labels))) or [""]) if per_label else [loss]
    rule_names = [rule.name for rule in rules]
    aligning = bool(loop.reading("alignment"))

    def of_each(values: Sequence[Any]) -> Any:
        """A number of the loop, or of each label's, as the state holds it."""
        return dict(zip(names, values, strict=True)) if per_label else values[0]

    def init_fn(params: optax.Params) -> FeedbackState:
        state = loop.init()
        if per_label:
            state = _parted(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(names),)), state), names)
        if not aligning:
            return state
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
        return state._replace(last=LastUpdate(zeros, of_each([jnp.zeros((), jnp.float32) for _ in names])))

    def factors_fn(
        updates: optax.Updates,
        state: FeedbackState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        grads: PyTree | None = None,
        grad_norm: Any = None,
        observed: Any = None,
        **extra_args: Any,
    ) -> tuple[Factors, FeedbackState]:
        del params, extra_args
        require(value, "value", "scale_by_feedback")
        blind = loop.reading("alignment", *(() if grad_norm is not None else ("grad_norm", "mean_grad_norm")))
        if blind and grads is None:
            raise ValueError(
                f"scale_by_feedback needs grads= for the rules {blind}: wrap the whole optimizer in observe(...), or "
                "call tx.update(grads, state, params, value=..., grads=...)."
            )
        leaves, treedef = jax.tree.flatten(updates)
        mine = jax.tree.leaves(align(labels, updates, "labels")) if per_label else [loss] * len(leaves)
        flags = flags_of(observed, updates)
        flagged = [[label == name and flag for label, flag in zip(mine, flags, strict=True)] for name in names]
        raw = [] if grads is None else jax.tree.leaves(align(grads, updates, "grads"))
        losses, norms, cosines = [number(value, "value", name) for name in names], None, None
        if grad_norm is not None:
            norms = [number(grad_norm, "grad_norm", name) for name in names]
        elif grads is not None:
            norms = [jnp.sqrt(dot(raw, raw, of)) for of in flagged]
        last = state.last
        if last is not None:
            # The first update of any optimizer is on one side of the gradient; later ones only on the average.
            before = jax.tree.leaves(last.update)
            sides = [last.side[name] for name in names] if per_label else [last.side]
            beside = [cosine(raw, leaves, of) for of in flagged]
            turned = [side + 0.01 * (now - side) for side, now in zip(sides, beside, strict=True)]
            cosines = [jnp.sign(s) * cosine(raw, before, of) for s, of in zip(turned, flagged, strict=True)]
        own = state._replace(last=None)
        if per_label:
            stacked: Any = [None if values is None else jnp.stack(values) for values in (losses, norms, cosines)]
            finite, after = jax.vmap(loop.advance)(_joined(own, names, rule_names), *stacked)
            scales, after = list(jnp.where(finite, after.scale, 0.0)), _parted(after, names)
        else:
            finite, after = loop.advance(own, losses[0], *(None if of is None else of[0] for of in (norms, cosines)))
            finite, scales = [finite], [jnp.where(finite, after.scale, 0.0)]
        scale, steps = dict(zip(names, scales, strict=True)), dict(zip(names, finite, strict=True))
        if last is not None:
            update = [jnp.where(steps[label], u, b) for label, u, b in zip(mine, leaves, before, strict=True)]
            side = [jnp.where(step, new, old) for step, new, old in zip(steps.values(), turned, sides, strict=True)]
            last = LastUpdate(treedef.unflatten(update), of_each(side))
        said = every_leaf(updates, treedef.unflatten([scale[label] for label in mine]))
        return said, after._replace(last=last)

    shown = {"lr_rules": {rule.name: rule.weight for rule in rules}, **numbers.shown()}
    size = len(names) * (36 + 8 * len(rules) + 4 * aligning)
    cost = f"{size} B" + " + 4 B a parameter" * aligning
    return multiplier(init_fn, factors_fn, Rule("scale_by_feedback", shown, cost))
