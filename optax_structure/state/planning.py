"""Which array of an old optimizer state each array of a new one continues: host-side, no array is touched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import is_traced
from optax_structure.state.cohorts import Cohorts
from optax_structure.state.markers import AgeClock, EventClock, LabelClock, Masks, Positions, RunClock
from optax_structure.state.moving import CohortPlan, Move
from optax_structure.state.slots import Entry
from optax_structure.structure import COMPONENTS

Mixed = Literal["error", "carry", "fresh"]

# Running averages of the squared gradient under a bias correction or a constant decay: an element that starts at zero
# beside a mature count is the shared-count fault. Every other array of a fresh element starts as its own init says.
_SECOND_MOMENTS = frozenset({"nu", "nu_max", "exp_avg_sq", "n"})
_SECOND_MOMENTS_OF: dict[Any, set[str]] = {optax.FactoredState: {"v", "v_row", "v_col"}}

_CLOCKS = (AgeClock, EventClock, LabelClock)


def _names(paths: Collection[str]) -> str:
    shown = sorted(paths)[:3]
    return ", ".join(repr(path) for path in shown) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


class Plan:
    """One transfer while it is being planned: which old array, if any, each new array continues."""

    def __init__(
        self,
        old: list[Entry],
        new: list[Entry],
        old_shapes: Mapping[str, tuple[int, ...]],
        new_shapes: Mapping[str, tuple[int, ...]],
        rename: Mapping[str, str],
        restarted: frozenset[str],
        moved: frozenset[str],
        shifted: frozenset[str],
        reset: frozenset[str],
        labels: Mapping[str, str],
        mixed: Mixed,
        built: Mapping[Any, Any],
    ):
        self.old, self.new, self.built = old, new, built
        self.old_shapes, self.new_shapes = old_shapes, new_shapes
        self.moved, self.shifted, self.reset, self.labels, self.mixed = moved, shifted, reset, labels, mixed
        self.origin = {
            path: None if path in restarted or rename.get(path, path) not in old_shapes else rename.get(path, path)
            for path in new_shapes
        }
        self.exact: dict[Any, list[int]] = {}
        self.loose: dict[Any, list[int]] = {}
        self.alike: dict[Any, list[int]] = {}
        for position, entry in enumerate(old):
            self.exact.setdefault((entry.trail, entry.index, entry.path), []).append(position)
            self.loose.setdefault((entry.kind, entry.field, entry.path), []).append(position)
            self.alike.setdefault((entry.trail, entry.path), []).append(position)
        self.new_loose: dict[Any, int] = {}
        self.new_alike: dict[Any, int] = {}
        for entry in new:
            key = (entry.kind, entry.field, entry.path)
            self.new_loose[key] = self.new_loose.get(key, 0) + 1
            self.new_alike[entry.trail, entry.path] = self.new_alike.get((entry.trail, entry.path), 0) + 1
        self.old_members = _members(old)
        self.new_members = _members(new)

    def candidates(self, entry: Entry, path: str | None) -> list[int]:
        """Old arrays that are the same as ``entry``, of the parameter ``path`` (None: of none)."""
        exact = self.exact.get((entry.trail, entry.index, path), [])
        alike = self.alike.get((entry.trail, path), [])
        fewer = path is not None and len(alike) > self.new_alike[entry.trail, entry.path] > 0
        # One of several equal transforms is gone, and nothing says which: fine only if they hold the same.
        if fewer and (entry.kind is LabelClock or not _all_equal([self.old[position].value for position in alike])):
            raise self._ambiguous(entry, alike)
        if exact or entry.kind is None:
            return exact
        if entry.kind is RunClock:  # there is one run, so all of its clocks say the same
            return self.loose.get((RunClock, entry.field, path), [])
        # Another wrapping (MultiSteps around it, inject_hyperparams ...): the innermost state still says what it is.
        loose = self.loose.get((entry.kind, entry.field, path), [])
        groups = {self.old[position].group for position in loose}
        if len(loose) > len(groups) or (loose and self.new_loose[entry.kind, entry.field, entry.path] > 1):
            raise self._ambiguous(entry, loose)
        return loose

    def _ambiguous(self, entry: Entry, found: list[int]) -> ValueError:
        return ValueError(
            f"{entry.describe()} could continue any of "
            f"{', '.join(self.old[position].describe() for position in found)}. Transfer between chains that name "
            "their states alike, or start from new_tx.init(new_params)."
        )

    def of_parameter(self, entry: Entry) -> Move:
        path = entry.path or ""
        if entry.kind is Masks:
            return Move("masks", path=path)
        if entry.kind is Positions:
            return Move("fresh")
        # A leaf that is reset keeps the components of its connections, which its cohorts know.
        origin = path if entry.kind is Cohorts and path in self.reset else self.origin[path]
        found = self.candidates(entry, origin) if origin is not None else []
        if entry.kind in _CLOCKS and entry.field == "since":
            return self._since(entry, found[0] if found else None)
        if not found or origin is None or (entry.field == "label" and entry.kind is LabelClock):
            return Move("fresh")
        position = found[0]
        if is_hyperparam(entry) and not self._as_built(entry, position):
            return Move("fresh")
        value, shape = self.old[position].value, jnp.shape(entry.value)
        untouched = path not in self.moved
        squares = entry.field in _SECOND_MOMENTS or entry.field in _SECOND_MOMENTS_OF.get(entry.kind, ())
        second_moment = ("belief" if entry.kind is optax.ScaleByBeliefState else "mean") if squares else ""
        if self.old_shapes[origin] != self.new_shapes[path] and untouched:
            raise ValueError(
                f"{path!r} has shape {self.new_shapes[path]} and had {self.old_shapes[origin]}: pass the growth= that "
                f"says where its rows came from, or start it fresh with restart=({path!r},)."
            )
        if entry.kind is Cohorts:
            return Move("cohort", old=position, path=path)
        if shape == self.new_shapes[path] and jnp.shape(value) == self.old_shapes[origin]:
            if untouched or not shape:
                return Move("keep", old=position)
            return Move("elements", old=position, path=path, second_moment=second_moment)
        if jnp.shape(value) == shape and (path not in self.shifted or int(np.prod(shape)) <= 1):
            return Move("keep", old=position)
        if entry.kind is optax.FactoredState:
            before = _factored_axis(entry.field, self.old_shapes[origin])
            after = _factored_axis(entry.field, self.new_shapes[path])
            if before == after and after is not None:
                return Move("rows", old=position, path=path, axis=after, second_moment=second_moment)
        raise ValueError(
            f"{entry.describe()} of {path!r} has shape {jnp.shape(value)} for a parameter of shape "
            f"{self.old_shapes[origin]} and {shape} for one of {self.new_shapes[path]}: its rows cannot be moved. "
            f"Start that leaf fresh with restart=({path!r},)."
        )

    def _since(self, entry: Entry, position: int | None) -> Move:
        """A leaf keeps its age on whatever clock it is now; a new leaf, or one with another label, is born now."""
        clock = _sibling(self.new, entry.instance, "count", entry.path)
        if position is None:
            return Move("unborn") if entry.kind is EventClock else Move("since", new_count=clock)
        before = self.old[position]
        labels = (-1, -1)
        if entry.kind is LabelClock:
            old_label = _sibling(self.old, before.instance, "label", before.path)
            labels = old_label, _sibling(self.new, entry.instance, "label", entry.path)
        old_count = _sibling(self.old, before.instance, "count", before.path)
        return Move(
            "since", old=position, old_count=old_count, new_count=clock, old_label=labels[0], new_label=labels[1]
        )

    def of_none(self, entry: Entry) -> Move:
        """A count, a key, an injected hyperparameter: one value for many leaves."""
        if entry.kind is Cohorts:
            return Move("fresh")  # the tables follow their connections: see cohort_plans
        found = self.candidates(entry, None)
        same_group = [position for position in found if self.old[position].group == entry.group]
        if is_hyperparam(entry):
            # A value edited in the state survives; one that new_tx was built with differently wins.
            own = same_group or (found if len(found) == 1 else [])
            return Move("keep", old=own[0]) if own and self._as_built(entry, own[0]) else Move("fresh")
        if not found:
            return Move("fresh")
        if getattr(entry.kind, "serves_all_ages", False):
            return Move("keep", old=(same_group or found)[0])
        members = self._members_of(entry)
        feeders: dict[int, str] = {}
        fresh: list[str] = []
        for path in members:
            source = self._feeder(path, found, entry.group)
            if source is None:
                fresh.append(path)
            else:
                feeders.setdefault(source, path)
        if not feeders:
            # Every leaf is new: a new start. No leaf at all: the group was emptied, and keeps its counters. A clock
            # whose group does not show its leaves goes on where no other clock and no fresh leaf leaves a choice.
            sole = found if len(found) == 1 and not entry.moments and None not in self.origin.values() else []
            own = same_group or sole
            return Move("keep", old=own[0]) if own and not members else Move("fresh")
        first = next(iter(feeders))
        clock = not entry.group and (not entry.moments or entry.kind is optax.MultiStepsState)
        values = [self.old[position].value for position in feeders] + [entry.value] * bool(fresh)
        if clock or _all_equal(values):
            return Move("keep", old=first)
        if self.mixed == "fresh":
            return Move("fresh")
        if self.mixed == "carry":
            return Move("keep", old=next((p for p in feeders if p in same_group), first))
        raise ValueError(
            f"{entry.describe()} is one counter for leaves of different age: {_names(fresh or list(feeders.values()))} "
            f"beside {_names(set(members) - set(fresh))}. A fresh leaf under a mature count gets updates several times "
            "too large. Give every leaf its own count with per_leaf(...), or choose mixed='carry' or mixed='fresh'."
        )

    def _as_built(self, entry: Entry, position: int) -> bool:
        old = self.old[position]
        before = self.built.get((old.trail, old.index, old.group))
        return before is None or _all_equal([before, entry.value])

    def _members_of(self, entry: Entry) -> list[str]:
        """The leaves that a value of none serves: those of its own state where it has moments, else of its group."""
        if entry.moments:
            return self.new_members.get(entry.instance, [])
        if not entry.group:
            return list(self.new_shapes)
        members = self.new_members.get(entry.group, [])
        if not members and entry.group[0] in self.labels.values():
            # A group without moments (sgd on a schedule) does not show its leaves; the labels of the growth do.
            members = [path for path, label in self.labels.items() if label == entry.group[0]]
        return members

    def _feeder(self, path: str, found: list[int], group: tuple[str, ...]) -> int | None:
        """Which of the old values ``found`` served the leaf; None when none did (a new or a thawed leaf)."""
        origin = self.origin[path]
        if origin is None:
            return None
        silent = []
        for position in found:
            entry = self.old[position]
            members = self.old_members.get(entry.instance if entry.moments else entry.group)
            if origin in (members or ()):
                return position
            if members is None and not entry.moments:
                silent.append(position)  # its group shows no leaves: it may have held this one
        return next((p for p in silent if self.old[p].group == group), silent[0] if len(silent) == 1 else None)

    def carried_out(self) -> tuple[tuple[Move, ...], tuple[CohortPlan, ...]]:
        """What becomes of every array of the new state, in its order, and of every table of cohorts."""
        moves = [self.of_none(entry) if entry.path is None else self.of_parameter(entry) for entry in self.new]
        cohorts = self.cohort_plans(moves)
        return tuple(moves), tuple(cohorts)

    def cohort_plans(self, moves: list[Move]) -> list[CohortPlan]:
        plans = []
        positions = [i for i, entry in enumerate(self.new) if entry.kind is Cohorts]
        for instance in dict.fromkeys(self.new[i].instance for i in positions):
            mine = [i for i in positions if self.new[i].instance == instance]
            leaves = [i for i in mine if self.new[i].field == "cohort"]
            before = {self.old[moves[i].old].instance for i in leaves if moves[i].kind != "fresh"}
            if len(before) > 1:
                raise ValueError(
                    f"Cohorts (state{instance}) would join connections of two transforms, whose cohorts have different "
                    "tables. Keep scale_by_connection outside optax.partition."
                )
            if not before:
                continue
            if any(self.new[i].path is not None for i in mine if i not in leaves):
                raise ValueError(
                    f"Cohorts (state{instance}) has a table a leaf, so scale_by_connection is inside per_leaf. Chain "
                    "it after per_leaf(...) instead: it keeps the birth of every connection by itself."
                )
            paths = tuple(self.new[i].path or "" for i in leaves)
            labels = [self.labels.get(path, "new") for path in paths]
            codes = tuple(COMPONENTS.index(label if label in COMPONENTS else "new") for label in labels)
            table = {self.new[i].field: i for i in mine}
            birth, component, used, count, synced = (table[name] for name in Cohorts._fields[1:])
            for name, position in table.items():
                if name != "cohort":
                    moves[position] = Move("keep", old=_sibling(self.old, next(iter(before)), name, None))
            plans.append(CohortPlan(paths, tuple(leaves), codes, (birth, component, used, count, synced)))
        return plans


def _sibling(entries: list[Entry], instance: str, field: str, path: str | None) -> int:
    """Index of the array in ``field`` of the state at ``instance``: the parameter's own, or the one for all."""
    mine = {e.path: i for i, e in enumerate(entries) if (e.instance, e.field) == (instance, field)}
    return mine[path if path in mine else None]


def _all_equal(values: list[Any]) -> bool:
    """Whether values on the host are the same; traced ones cannot be compared, and one is equal to itself."""
    first, *others = values
    if any(is_traced(value) for value in values):
        return not others
    return all(np.array_equal(_bits(first), _bits(value)) for value in others)


def _bits(value: Any) -> Any:
    """The value, or the bits of a random key, which NumPy cannot compare."""
    return jax.random.key_data(value) if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key) else value


def is_hyperparam(entry: Entry) -> bool:
    return len(entry.trail) > 1 and entry.trail[-1][0] is None and entry.trail[-2][1] == "hyperparams"


def _members(entries: list[Entry]) -> dict[Any, list[str]]:
    """Paths by state instance and by group (every enclosing group included)."""
    members: dict[Any, dict[str, None]] = {}
    for entry in entries:
        if entry.path is not None:
            for key in [entry.instance, *(entry.group[:depth] for depth in range(len(entry.group) + 1))]:
                members.setdefault(key, {})[entry.path] = None
    return {key: list(paths) for key, paths in members.items()}


def _factored_axis(field: str, shape: tuple[int, ...]) -> int | None:
    """The parameter's axis that Adafactor's row (column) factor of a matrix runs along: its shorter (longer) one."""
    if len(shape) != 2:
        return None
    shorter, longer = (int(axis) for axis in np.argsort(shape))
    return {"v_row": shorter, "v_col": longer}.get(field)
