"""The search: OR-tools' CP-SAT finds the fewest hosts, then among those placements the one that moves the fewest bytes.

Variables: `on[h]`, host h is used; `at[g, h]`, guest g ends up on h (only where its own rules let it). Constraints:

    each guest on one host           Σ_h at[g, h] = 1
    every resource r of every host   Σ_g needs[g, r]·at[g, h] ≤ has[h, r]·on[h]
    a host is used if a guest is     at[g, h] ≤ on[h] ≤ Σ_g at[g, h]
    groups that are to be apart      Σ_{g in group} at[g, h] ≤ 1

The first search minimises Σ on[h] (or the power of hosts at idle), the second holds that figure and minimises what the
moves send, in MiB, with one more for each move: of equal bytes, the fewest guests. Each begins with the best placement
known, so a search that is cut short still has an answer, and its bound says how far from the optimum it may be.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ostler.errors import BadRequest, HostError
from ostler.images.progress import Progress, silent
from ostler.planning.check import violations
from ostler.planning.draining import drained
from ostler.planning.estate import MIB, Dimension, Estate, Guest, Placement, dimensions, hosts_used, moves

Goal = Literal["hosts", "power"]
INSTALL = "`ostler plan` needs OR-tools and matplotlib: pip install 'ostler[plan]'"
# Of the whole time, what the first search may take before the second has its turn.
_FIRST_SHARE = 0.7
_WAKE_S = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """One search's end, in its objective's own unit."""

    value: int
    bound: int
    """No placement is better than this."""

    @property
    def is_optimal(self) -> bool:
        """Whether it is proven that nothing better exists."""
        return self.bound >= self.value

    @property
    def gap(self) -> float:
        """How much better the optimum could be, as a share of the value."""
        return 0.0 if self.is_optimal else (self.value - self.bound) / self.value


@dataclass(frozen=True, slots=True)
class Solution:
    """A placement that keeps all rules."""

    placement: Placement
    goal: Goal
    first: Outcome
    """Hosts, or tenths of a watt at idle."""
    second: Outcome
    """MiB to send, and one for each move."""
    elapsed_s: float
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class _Objective:
    cost: Any
    """A linear expression of the model."""
    value_of: Callable[[Placement], int]
    unit: str


def solve(
    estate: Estate, *, time_limit_s: float = 5.0, goal: Goal = "hosts", workers: int | None = None,
    progress: Progress = silent,
) -> Solution:  # fmt: skip
    """Search for at most `time_limit_s`; Ctrl-C ends the search and keeps what it found.

    Raises BadRequest where no placement can keep the rules and where libraries are missing, HostError where none was
    found in time.
    """
    if not estate.hosts or not estate.guests:
        raise BadRequest("nothing to plan: expected at least one host and one guest")
    sizes = dimensions(estate)
    refuse_homeless(estate, sizes)
    return _Search(estate, sizes, goal, time_limit_s, workers, progress).run()


def refuse_homeless(estate: Estate, sizes: tuple[Dimension, ...]) -> None:
    """Raise BadRequest for a guest that no host could take even if it were empty, and say why."""
    for guest in estate.guests:
        allowed = [host for host in estate.hosts if estate.may_run(guest, host)]
        if not allowed:
            raise BadRequest(f"guest {guest.name!r}: its rules (pinned, only_on, needs, drain) leave it no host")
        if not any(_fits_empty(guest, host.name, sizes) for host in allowed):
            least = max(sizes, key=lambda each: each.needs[guest.name] / (max(each.has.values(), default=0) or 1))
            raise BadRequest(
                f"guest {guest.name!r}: asks for {least.needs[guest.name]} {least.unit} of {least.name}, more than any "
                f"host it may run on has below its headroom"
            )


def _fits_empty(guest: Guest, host: str, sizes: tuple[Dimension, ...]) -> bool:
    return all(host not in each.has or each.needs[guest.name] <= each.has[host] for each in sizes)


class _Search:
    def __init__(
        self, estate: Estate, sizes: tuple[Dimension, ...], goal: Goal, time_limit_s: float, workers: int | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self._begun = time.monotonic()
        self._estate, self._sizes, self._goal = estate, sizes, goal
        self._time_limit_s, self._workers, self._progress = time_limit_s, workers, progress
        self._interrupted = False
        self._module = _cp_model()
        self._model = self._module.CpModel()
        self._on = {host.name: self._model.new_bool_var(f"on {host.name}") for host in estate.hosts}
        self._at = {
            (guest.name, host.name): self._model.new_bool_var(f"{guest.name} at {host.name}")
            for guest in estate.guests
            for host in estate.hosts
            if estate.may_run(guest, host) and _fits_empty(guest, host.name, sizes)
        }
        self._constrain()

    def run(self) -> Solution:
        """Both searches."""
        objective = self._hosts()
        known = drained(self._estate, self._sizes)
        placement, first = self._minimise(objective, known, self._time_left_s() * _FIRST_SHARE)
        self._model.add(objective.cost <= first.value)
        placement, second = self._minimise(self._bytes(), placement, self._time_left_s())
        if broken := violations(self._estate, placement):
            raise HostError(f"the plan breaks a rule, which is a bug of Ostler's: {broken[0]}")
        elapsed_s = time.monotonic() - self._begun
        return Solution(placement, self._goal, first, second, elapsed_s, interrupted=self._interrupted)

    def _time_left_s(self) -> float:
        return max(0.05, self._begun + self._time_limit_s - time.monotonic())

    def _constrain(self) -> None:
        model = self._model
        of_guest: dict[str, list[Any]] = {guest.name: [] for guest in self._estate.guests}
        of_host: dict[str, dict[str, Any]] = {host.name: {} for host in self._estate.hosts}
        for (guest, host), variable in self._at.items():
            of_guest[guest].append(variable)
            of_host[host][guest] = variable
            model.add_implication(variable, self._on[host])
        for variables in of_guest.values():
            model.add_exactly_one(variables)
        groups = _groups(self._estate)
        for host, guests in of_host.items():
            model.add_bool_or([*guests.values(), self._on[host].negated()])
            for each in self._sizes:
                if host in each.has:
                    asked = sum(each.needs[guest] * variable for guest, variable in guests.items())
                    model.add(asked <= each.has[host] * self._on[host])
            for group in groups:
                model.add_at_most_one([guests[name] for name in group if name in guests])

    def _hosts(self) -> _Objective:
        if self._goal == "power":
            weights = {host.name: round(host.idle_w * 10) for host in self._estate.hosts}
        else:
            weights = {host.name: 1 for host in self._estate.hosts}
        return _Objective(
            cost=sum(weights[host] * variable for host, variable in self._on.items()),
            value_of=lambda placement: sum(weights[host] for host in hosts_used(placement)),
            unit="hosts" if self._goal == "hosts" else "× 0.1 W at idle",
        )

    def _bytes(self) -> _Objective:
        weights = {guest.name: math.ceil(guest.moved_bytes / MIB) + 1 for guest in self._estate.guests}
        movable = [guest for guest in self._estate.guests if guest.host is not None]
        homes = {guest.name: guest.host for guest in movable}
        stays = sum(weights[guest] * at for (guest, host), at in self._at.items() if homes.get(guest) == host)
        return _Objective(
            cost=sum(weights[guest.name] for guest in movable) - stays,
            value_of=lambda placement: sum(weights[guest.name] for guest in moves(self._estate, placement)),
            unit="MiB to move",
        )

    def _minimise(self, objective: _Objective, known: Placement | None, time_s: float) -> tuple[Placement, Outcome]:
        """Search from the placement that is known, if any; it stands where nothing better is found."""
        module, solver = self._module, self._module.CpSolver()
        self._model.minimize(objective.cost)
        self._hint(known)
        solver.parameters.max_time_in_seconds = time_s
        solver.parameters.random_seed = 1
        # Ctrl-C is Python's: see _watched.
        solver.parameters.catch_sigint_signal = False
        if self._workers is not None:
            solver.parameters.num_workers = self._workers
        status = self._watched(solver, objective.unit, time_s)
        if status == module.INFEASIBLE:
            raise BadRequest(
                f"no placement keeps all rules: {len(self._estate.guests)} guests do not fit "
                f"{len(self._estate.hosts)} hosts with this headroom"
            )
        bound = 0 if status is None else math.ceil(solver.best_objective_bound - 1e-6)
        if status not in (module.OPTIMAL, module.FEASIBLE):
            if known is None:
                ended = "was interrupted" if self._interrupted else f"found none within {self._time_limit_s:g} s"
                raise HostError(f"no plan: the search {ended}; --time-limit gives it longer")
            value = objective.value_of(known)
            return known, Outcome(value, min(value, max(0, bound)))
        found = {guest: host for (guest, host), variable in self._at.items() if solver.value(variable)}
        value = objective.value_of(found)
        return found, Outcome(value, value if status == module.OPTIMAL else min(value, bound))

    def _hint(self, known: Placement | None) -> None:
        self._model.clear_hints()
        if known is None:
            return
        used = hosts_used(known)
        for (guest, host), variable in self._at.items():
            self._model.add_hint(variable, known[guest] == host)
        for host, variable in self._on.items():
            self._model.add_hint(variable, host in used)

    def _watched(self, solver: Any, unit: str, time_s: float) -> Any:
        """Run the solver in a thread of its own, so that Ctrl-C reaches this one and can end the search softly."""
        if self._interrupted:
            return None
        listener = _listener(self._module, self._progress, unit, time_s)
        result: list[Any] = []
        # Not thread.join: of Python 3.11 that takes an interrupted thread for one that has ended.
        ended = threading.Event()

        def search() -> None:
            try:
                result.append(solver.solve(self._model, listener))
            finally:
                ended.set()

        threading.Thread(target=search, name="cp-sat").start()
        while not ended.is_set():
            try:
                ended.wait(_WAKE_S)
            except KeyboardInterrupt:
                self._interrupted = True
                solver.stop_search()
        if not result:
            raise HostError("the solver ended without an answer, which is a bug")
        return result[0]


def _groups(estate: Estate) -> list[list[str]]:
    """Members of each group that is to be apart."""
    found: dict[str, list[str]] = {}
    for guest in estate.guests:
        for group in sorted(guest.apart):
            found.setdefault(group, []).append(guest.name)
    return list(found.values())


def _cp_model() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ModuleNotFoundError as error:
        raise BadRequest(INSTALL) from error
    return cp_model


def _listener(module: Any, progress: Progress, unit: str, time_s: float) -> Any:
    """A callback of the solver's that tells of each better placement."""

    class Listener(module.CpSolverSolutionCallback):  # type: ignore[misc]
        def on_solution_callback(self) -> None:
            bound = math.ceil(self.best_objective_bound - 1e-6)
            share = min(1.0, self.wall_time / time_s)
            progress(f"planning: {round(self.objective_value)} {unit}, none below {max(0, bound)}", share)

    return Listener()
