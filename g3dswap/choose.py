"""From a problem to the kernel that runs it: looked up, tuned, or PyTorch's own, and the reason why.

The order: what this process has decided, an installed plan, the exact cache entry, tuning (if asked
for), the nearest cache entry, the untimed default (only if asked for), PyTorch's own kernel.  One of
our kernels is chosen only where it was measured to be faster than PyTorch's by `min_speedup`, and run
only after a check against float64 in this process.  Whatever fails ends with PyTorch's kernel and one
warning.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import decided, once, ranks
from .choice import Choice, Record
from .decided import LOCK, Decided
from .errors import ArgumentError, NoCompilerError, ScheduleError
from .guessed import Guesses
from .once import warn_once
from .problem import Problem
from .progress import Bar
from .searched import search, tell_failures, tells_of_kernels
from .stored import EFFORTS, Options, Stored, close_caches, key_of, open_cache
from .tc import kernel
from .tc.cache import Cache, default_directory
from .tc.schedule import Schedule
from .tc.trial import TunerConfig, brief
from .workload import Candidate, attempt, prepare, race, tuning_batch

CONFIGS = {"quick": TunerConfig.quick, "full": TunerConfig.full}
MIN_SPEEDUP = 1.05
BUILD_SECONDS = 60.0  # for a kernel that is known to be worth building
PATIENCE = 120.0  # seconds that a rank waits for another's choice, beside five times the budget


_choosers: dict[tuple[str, Path], Chooser] = {}
_asked: Counter[str] = Counter()


def resolve(problem: Problem, batch: int = 1, tune: str = "cached", cache: str = "") -> Choice:
    """The choice for a problem; `cache` is a directory, "" the default one.

    A decision that a `Chooser` has made in this process holds here too, whatever its `min_speedup`.
    """
    directory = Path(cache).expanduser() if cache else default_directory()
    known = decided.made.get((directory, problem))
    if known and known.serves(tune, None):
        return known.choice
    with LOCK:
        if (tune, directory) not in _choosers:
            _choosers[tune, directory] = Chooser(open_cache(directory), tune)
        return _choosers[tune, directory].choose(problem, batch)


def forget() -> None:
    """Forget all decisions, installed plans and given warnings of this process."""
    with LOCK:
        decided.forget()
        _choosers.clear()
        _asked.clear()
        close_caches()
        once.forget()


class Chooser:
    """Decides problems with one cache and one set of rules.

    tune:         "none" (the default schedule, untimed, if the cache has nothing), "cached", "quick", "full".
    min_speedup:  how much faster than PyTorch's a kernel must be.
    progress:     show a bar while tuning; `expect` says how many passes it will cover.
    config:       the tuner's budget, instead of the preset for `tune` and the device.

    After a Ctrl-C `interrupted` is true: that pass keeps what was measured, and nothing more is tuned.
    `counts` sums the tuner's trials by category. Thread-safe.
    """

    def __init__(
        self,
        cache: Cache,
        tune: str = "quick",
        min_speedup: float = MIN_SPEEDUP,
        progress: bool = True,
        config: TunerConfig | None = None,
    ) -> None:
        if tune not in EFFORTS:
            raise ArgumentError(f"tune={tune!r} is unknown; use one of {', '.join(EFFORTS)}.")
        if not min_speedup >= 0:
            raise ArgumentError(f"min_speedup={min_speedup!r} must be a number of at least 0, say 1.05.")
        self.cache, self.tune, self.min_speedup = cache, tune, float(min_speedup)
        self.options = Options(cache)
        self.guesses = Guesses()
        self.config = config
        self.interrupted = False
        self.counts: Counter[str] = Counter()
        self.bar = Bar(progress)

    def expect(self, passes: int) -> None:
        """Start a progress bar over that many calls of `choose`."""
        self.bar.close()
        self.bar = Bar(self.bar.enabled, passes)

    def prepare(self, wanted: Iterable[tuple[Problem, int, str]]) -> None:
        """Compile side by side what `choose` is going to build without a search; arguments as for it.

        What fails here fails there again, and is told there.
        """
        with LOCK:
            waiting = [(problem, batch) for problem, batch, _ in wanted if self._known(problem) is None]
            expected = [(problem, self._expected(problem, batch)) for problem, batch in waiting]
            found = [(problem, schedule) for problem, schedule in expected if schedule]
            if len(found) < 2:
                return
            # Beside the one that takes longest the others compile.
            found.sort(key=lambda item: item[1].warp_lanes, reverse=True)
            # Ranks begin at different places: what one of them has compiled the others find.
            prepare(ranks.rotated(found), BUILD_SECONDS)

    def share(self, wanted: Iterable[tuple[Problem, int, str]]) -> None:
        """Choose what no other rank has begun, if the ranks share the work; arguments as for `choose`.

        Afterwards every problem is decided or being decided somewhere, and `choose` knows or waits.
        """
        turns = ranks.shares(list(wanted))
        for problem, batch, label in turns:
            if not self.interrupted and not ranks.begun(self._topic(problem)):
                self.choose(problem, batch, label)

    def choose(self, problem: Problem, batch: int = 1, label: str = "") -> Choice:
        """The choice for a problem, decided once in a process; `label` names the layer for the bar."""
        place = (self.cache.directory, problem)
        with LOCK:
            known = self._known(problem)
            if known is None:
                try:
                    known = self._planned(problem) or self._agreed(problem, max(1, batch), label)
                except BaseException:
                    self.bar.close()
                    raise
                decided.remember(place, known)
            self.bar.advance()
            return known.choice

    def key(self, problem: Problem) -> dict[str, Any]:
        """The cache key of a problem on this machine."""
        return key_of(problem)

    def budget(self, problem: Problem) -> TunerConfig:
        """What tuning a problem may cost."""
        return self.config or CONFIGS.get(self.tune, TunerConfig.quick)(kernel.target_of(problem.device))

    def _known(self, problem: Problem) -> Decided | None:
        """The decision that holds for this chooser, if it was made."""
        known = decided.made.get((self.cache.directory, problem))
        return known if known and known.serves(self.tune, self.min_speedup) else None

    def _decision(self, choice: Choice, effort: int) -> Decided:
        return Decided(choice, effort, self.tune, self.min_speedup)

    # Plans and other ranks: a choice without its kernel.

    def _planned(self, problem: Problem) -> Decided | None:
        if problem not in decided.planned:
            return None
        choice = self._rebuilt(decided.planned[problem], "planned")
        if choice is None:
            del decided.planned[problem]
            return None
        # Nothing that is asked for later replaces what a plan says, but another plan.
        return self._decision(
            replace(choice, reason=f"from the plan: {choice.reason}"), max(EFFORTS.values())
        )

    def _agreed(self, problem: Problem, batch: int, label: str) -> Decided:
        if not ranks.active():
            return self._decide(problem, batch, label)
        topic = self._topic(problem)
        _asked[self._rules(problem)] += 1
        made: list[Decided] = []

        def decide() -> dict[str, Any]:
            made.append(self._decide(problem, batch, label))
            return {"choice": made[0].choice.to_json(), "effort": made[0].effort}

        patience = PATIENCE + 5 * self.budget(problem).seconds
        told, mine = ranks.agree(topic, decide, patience)
        if mine:
            return made[0]
        if told is None:
            return self._decide(problem, batch, label)
        choice = self._rebuilt(Choice.from_json(told["choice"]), "other rank's")
        return self._decision(choice or native(problem, "the other ranks' kernel fails here"), told["effort"])

    def _rules(self, problem: Problem) -> str:
        rules = {"key": self.key(problem), "tune": self.tune, "min_speedup": self.min_speedup}
        return json.dumps(rules, sort_keys=True)

    def _topic(self, problem: Problem) -> dict[str, Any]:
        """What the ranks agree on: a problem under these rules, the first or a later time."""
        rules = self._rules(problem)
        return {"rules": rules, "time": _asked[rules] + 1}

    def _rebuilt(self, choice: Choice, whose: str) -> Choice | None:
        """The choice with its kernel built and checked; None, and a warning, if that fails."""
        if choice.schedule is None:
            return replace(choice, candidate=Candidate(choice.problem))
        found = self._checked(choice.problem, choice.schedule, choice.bound, whose)
        return replace(choice, candidate=found) if found else None

    # The order of the sources.

    def _usable(self, problem: Problem) -> Iterator[Stored]:
        """What is stored and serves this chooser, in the order in which it is tried."""
        return self.options.usable(problem, 0 if self.interrupted else EFFORTS[self.tune])

    def _expected(self, problem: Problem, batch: int) -> Schedule | None:
        """The schedule that is built first for a problem, if one is without a search."""
        try:
            if problem in decided.planned:
                data = decided.planned[problem].schedule
            elif first := next(self._usable(problem), None):
                data = None if self._against(first.record) else first.record.schedule
            else:
                return next(self._guesses(problem, batch), None)
            return None if data is None else Schedule.from_json(data)
        except (NoCompilerError, ScheduleError):
            return None

    def _guesses(self, problem: Problem, batch: int) -> Iterator[Schedule]:
        """The cost model's choices, only where the user wants no tuning. ScheduleError: there are none."""
        if self.tune == "none" and not self.interrupted:
            yield from self.guesses.of(problem, batch)

    def _decide(self, problem: Problem, batch: int, label: str) -> Decided:
        tried: list[Record] = []
        try:
            for stored in self._usable(problem):
                choice = self._verdict(problem, stored, batch)
                if choice:
                    if stored.source == "nearest":
                        self._advise(
                            f"{problem} has no tuned options, and the nearest are used, {stored.what}"
                        )
                    return self._decision(choice, stored.effort)
                tried.append(stored.record)
            if EFFORTS[self.tune] and not self.interrupted:
                kernel.require(kernel.target_of(problem.device))
                try:
                    return self._decision(self._tuned(problem, batch, label, tried), EFFORTS[self.tune])
                except KeyboardInterrupt:  # before there was anything to keep
                    self.interrupted = True
                    return self._decide(problem, batch, label)
            return self._decision(self._default(problem, batch) or self._untuned(problem), 0)
        except NoCompilerError as error:
            warn_once("no compiler", f"PyTorch's own kernels run: {error}")
            return self._decision(native(problem, "no compiler"), max(EFFORTS.values()))

    def _against(self, record: Record) -> str:
        """Why a record speaks for PyTorch's kernel; "" if it does not."""
        if record.schedule is None:
            return "no kernel worked"
        if record.speedup < self.min_speedup:
            return f"the best kernel was {record.speedup:.2f}x and {self.min_speedup:g}x is wanted"
        return ""

    def _verdict(
        self, problem: Problem, stored: Stored, batch: int, candidate: Candidate | None = None
    ) -> Choice | None:
        """What a record says, its kernel built and checked; None, and a warning, if that fails."""
        if said := self._for_pytorch(problem, stored):
            return said
        assert stored.record.schedule
        candidate = candidate or self._checked(
            problem, stored.record.schedule, stored.record.bound, stored.source
        )
        if candidate is None:
            return None
        batch = tuning_batch(problem, batch)
        raced = stored if stored.tells_of(batch) else self._raced(stored, candidate, batch)
        if raced is None:
            return None
        if said := self._for_pytorch(problem, raced):
            return said
        record = raced.record
        return Choice(
            problem,
            raced.source,
            reason=f"{raced.what}, {record.speedup:.2f}x",
            seconds=record.seconds if raced.timed else None,
            native_seconds=record.native_seconds if raced.timed else None,
            error=record.error,
            bound=record.bound,
            schedule=record.schedule,
            candidate=candidate,
        )

    def _for_pytorch(self, problem: Problem, stored: Stored) -> Choice | None:
        """PyTorch's kernel, if a record speaks for it."""
        against = self._against(stored.record)
        if not against:
            return None
        return native(problem, f"{stored.what}, {against}", stored.record.native_seconds)

    def _raced(self, stored: Stored, candidate: Candidate, batch: int) -> Stored | None:
        """A record of another size, or of a far batch, with the times of a race with PyTorch's kernel here.

        As it is where there is no memory for that; None, said once, if its kernel fails.
        """
        try:
            return stored.raced(batch, *race(candidate, batch))
        except torch.OutOfMemoryError:
            return stored
        except Exception as error:
            self._refuse(candidate.problem, stored.source, brief(error))
            return None

    def _checked(
        self, problem: Problem, schedule: dict[str, Any], bound: float | None, whose: str
    ) -> Candidate | None:
        """A stored schedule, built and checked in this process; None, said once, if either fails."""
        found, why = attempt(problem, schedule, bound, BUILD_SECONDS)
        if found is None:
            self._refuse(problem, whose, why)
        return found

    def _refuse(self, problem: Problem, whose: str, why: str) -> None:
        warn_once(
            f"{whose} {problem}",
            f"The {whose} schedule for {problem} is not used ({why}); tune it again.",
        )

    def _tuned(self, problem: Problem, batch: int, label: str, tried: list[Record]) -> Choice:
        """Search, store what was found, and choose."""
        batch = tuning_batch(problem, batch)
        name = f"{label} {problem.direction}".strip()
        try:
            seeds = partial(self.options.seeds, problem, tried)
            result = search(problem, batch, self.budget(problem), seeds, partial(self.bar.update, name))
        except NoCompilerError:
            raise
        except Exception as error:
            why = brief(error)
            warn_once(
                "tuning failed", f"PyTorch's own kernel runs {problem}, because tuning it failed: {why}"
            )
            return native(problem, f"tuning failed: {why}")
        self.counts.update(result.counts)
        self.interrupted = self.interrupted or result.interrupted
        effort = "full" if self.tune == "full" else "quick"
        record = Record.of(result, batch, effort)
        if tells_of_kernels(record):
            self.cache.put(self.key(problem), record.to_json())
        tell_failures(problem, record)
        what = "tuned until interrupted" if result.interrupted else "tuned"
        what += f" ({', '.join(f'{count} {category}' for category, count in record.counts.items())})"
        here = result.candidate if isinstance(result.candidate, Candidate) else None
        choice = self._verdict(problem, Stored(record, "tuned", what), batch, here)
        return choice or native(problem, f"{what}, but its kernel fails here", record.native_seconds)

    def _default(self, problem: Problem, batch: int) -> Choice | None:
        """The first default schedule that passes its check, not timed."""
        why = ""
        try:
            for guess in self._guesses(problem, batch):
                schedule = guess.to_json()
                found, why = attempt(problem, schedule, None, BUILD_SECONDS)
                if found:
                    return Choice(problem, "default", "not timed", schedule=schedule, candidate=found)
        except ScheduleError as error:
            warn_once(f"default {problem}", f"PyTorch's own kernel runs {problem}: {error}")
            return None
        if why:
            self._refuse(problem, "default", why)
        return None

    def _untuned(self, problem: Problem) -> Choice:
        if self.interrupted:
            return native(problem, "tuning was interrupted before this pass")
        self._advise(f"{problem} has no tuned options, and PyTorch's own kernel is used")
        return native(problem, "no tuned entry; run g3dswap tune")

    def _advise(self, what: str) -> None:
        warn_once("untuned", f'{what}; run "g3dswap tune" or convert with tune="quick" for faster kernels.')


def native(problem: Problem, reason: str, native_seconds: float | None = None) -> Choice:
    """The choice of PyTorch's own kernel."""
    candidate = Candidate(problem)
    return Choice(problem, "native", reason, native_seconds, native_seconds, candidate=candidate)
