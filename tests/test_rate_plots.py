"""Traces of rates, dry or of a run, and their picture."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs

pytest.importorskip("flax")
from optax_structure.training import RateRecord, RateTrace, plot_rates, rate_record, trace_rates

PARAMS = {"body": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 3))}}
LABELS = {"body": "scaffold", "head": "new"}


def warmed() -> optax.GradientTransformationExtraArgs:
    by_label = oxs.scale_by_label({"scaffold": 0.5, "new": optax.linear_schedule(0.0, 1.0, 4)}, LABELS)
    return optax.chain(optax.scale_by_adam(), by_label, oxs.scale_on_event({"scaffold": 0.5}, LABELS))


def test_a_dry_run_gives_the_rates_of_every_step() -> None:
    trace = trace_rates(warmed(), PARAMS, LABELS, 8, extra=lambda step: {"event": (step == 2) | (step == 5)})
    assert trace.steps.tolist() == list(range(8))
    np.testing.assert_allclose(trace.mean["new"], [0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    np.testing.assert_allclose(trace.mean["scaffold"], [0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125])


def test_recording_seldom_skips_no_update() -> None:
    def extra(step: Any) -> dict[str, Any]:
        return {"event": step == 4}

    full = trace_rates(warmed(), PARAMS, LABELS, 8, extra=extra)
    seldom = trace_rates(warmed(), PARAMS, LABELS, 8, extra=extra, every=3)
    assert seldom.steps.tolist() == [0, 3, 6]
    for label in ("scaffold", "new"):
        np.testing.assert_array_equal(seldom.mean[label], full.mean[label][::3])


def test_a_dry_run_goes_on_from_a_state() -> None:
    tx = oxs.scale_by_age(optax.linear_schedule(0.0, 1.0, 4))
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(PARAMS, state)
    np.testing.assert_allclose(trace_rates(tx, PARAMS, LABELS, 2, state=state).mean["new"], [0.5, 0.75])


def test_the_band_is_the_spread_over_parameters() -> None:
    tx = oxs.scale_by_depth(0.25, {"body": {"kernel": 0, "bias": 1}, "head": 2})
    trace = trace_rates(tx, PARAMS, LABELS, 1)
    # Four parameters at 0.25 and two at 0.5.
    found = [part["scaffold"][0] for part in (trace.low, trace.mean, trace.high)]
    np.testing.assert_allclose(found, [0.25, 2 / 6, 0.5], rtol=1e-6)


def test_gradients_are_those_that_are_given() -> None:
    tx = oxs.scale_by_masked_trust_ratio(trust_coefficient=1.0, eps=0.0)
    params = {"w": jnp.array([3.0, 4.0])}
    trace = trace_rates(tx, params, {"w": "new"}, 3, grads=lambda step: {"w": jnp.array([0.0, 1.0]) * (step + 1)})
    np.testing.assert_allclose(trace.mean["new"], [5.0, 2.5, 5 / 3], rtol=1e-6)


def test_records_of_a_run_agree_with_the_dry_run() -> None:
    tx, records = warmed(), []
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(4):
        event = jnp.asarray(step == 2)
        records.append(rate_record(step, tx, state, PARAMS, LABELS, event=event))
        _, state = update(PARAMS, state, PARAMS, event=event)
    dry = trace_rates(tx, PARAMS, LABELS, 4, extra=lambda step: {"event": step == 2})
    logged = RateTrace.of(reversed(records))  # in any order
    for ours, theirs in zip(logged[1:], dry[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for label in ours:
            np.testing.assert_allclose(ours[label], theirs[label], rtol=1e-6)


def test_labels_may_come_and_go() -> None:
    spread = oxs.rates_by_label({"w": 0.5}, {"w": "scaffold"}, {"w": jnp.ones(1)})["scaffold"]
    records = [RateRecord(0, {"a": spread}), RateRecord(5, {"a": spread, "b": spread}), RateRecord(9, {"b": spread})]
    trace = RateTrace.of(records)
    np.testing.assert_array_equal(trace.mean["a"], [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(trace.high["b"], [np.nan, 0.5, 0.5])


def test_a_label_without_connections_has_no_rate() -> None:
    params = {"kernel": jnp.zeros((2, 2))}
    tx = oxs.sparse(oxs.scale_by_connection(oxs.component_rule(scaffold=0.5)), {"kernel": jnp.zeros((2, 2), bool)})
    assert np.isnan(trace_rates(tx, params, "scaffold", 1).mean["scaffold"]).all()


@pytest.mark.parametrize("name", ["steps", "every"])
def test_counts_below_one_are_refused(name: str) -> None:
    arguments: dict[str, Any] = {"steps": 3, "every": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be"):
        trace_rates(warmed(), PARAMS, LABELS, **arguments)


@pytest.mark.parametrize(
    "wrap",
    [lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(), lambda tx: optax.apply_if_finite(tx, 3)],
    ids=["MultiSteps", "apply_if_finite"],
)
def test_a_multiplier_in_a_branch_is_named(wrap: Any) -> None:
    inner = oxs.scale_by_label({"scaffold": 0.5, "new": 1.0}, LABELS)
    tx = wrap(inner)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"tx hides a multiplier in a branch.*MultiSteps.*inner_opt_state"):
        rate_record(0, tx, state, PARAMS, LABELS)
    with pytest.raises(ValueError, match=r"tx hides a multiplier in a branch"):
        trace_rates(tx, PARAMS, LABELS, 2)
    # What the message says to do.
    within = getattr(state, "inner_opt_state", None) or state.inner_state
    assert float(rate_record(0, inner, within, PARAMS, LABELS).spreads["scaffold"].mean) == 0.5
    assert float(oxs.rates(tx, state, PARAMS)["body"]["bias"]) == 0.5


def test_no_record_is_an_error() -> None:
    with pytest.raises(ValueError, match="records is empty"):
        RateTrace.of([])


def trace_of(*rows: tuple[str, list[float]]) -> RateTrace:
    values = {label: np.array(row, np.float32) for label, row in rows}
    return RateTrace(np.arange(len(rows[0][1])), values, values, values)


@pytest.mark.parametrize(
    ("rates", "scale"), [([1.0, 0.5], "linear"), ([1.0, 0.01], "log"), ([1.0, 0.01, 0.0], "symlog")]
)
def test_the_axis_is_logarithmic_where_the_rates_ask_for_it(rates: list[float], scale: str) -> None:
    pytest.importorskip("matplotlib")
    assert plot_rates(trace_of(("scaffold", rates))).get_yscale() == scale


def test_axes_that_share_a_logarithmic_scale_keep_it() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, rates in ((left, [1.0, 0.01]), (right, [1.0, 0.5])):
        plot_rates(trace_of(("scaffold", rates)), ax=ax)
    assert (left.get_yscale(), right.get_yscale()) == ("log", "log")


def test_the_picture_has_a_line_a_label_and_names_that_do_not_overlap(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = trace_of(("scaffold", [0.5, 0.5]), ("patch", [0.5, 0.5]), ("b", [0.5, np.nan]))
    events = [(0.0, "grown"), (0.01, "grown again")]
    path = tmp_path / "rates.png"
    ax = plot_rates(trace, path, base=lambda step: 2.0 - step, events=events, title="rates")
    drawn = [np.asarray(line.get_ydata()).tolist() for line in ax.lines[:2]]
    assert drawn == [[1.0, 0.5]] * 2, "multiplied by the schedule"
    texts = {text.get_text(): text for text in ax.texts}
    assert texts.keys() == {"scaffold", "patch", "b", "grown", "grown again"}
    for one, other in (("scaffold", "patch"), ("grown", "grown again")):
        assert not texts[one].get_window_extent().overlaps(texts[other].get_window_extent())
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert os.listdir(tmp_path) == ["rates.png"], "no part is left over"


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_rates(trace_of(("scaffold", [1.0])))
