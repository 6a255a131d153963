"""Measured time of a call on a device: cold-enough data, the lower quartile, few repeats.

What disturbs a run (another process on the core that its second thread needs, say) only lengthens it,
by ten times or more on a busy machine.  The median is then a time of the other processes; the lower
quartile stays a time of this call as long as a quarter of the runs is undisturbed.

Every run is preceded by reading a buffer larger than the nearest cache that survives between two
calls (a core's L2 on a CPU, the L2 of a GPU).  Inside a network a layer's operands do not sit in
that cache either: the layers before it have just streamed through it.  The read is a PyTorch
kernel, so on a CPU it also hands the cores over from PyTorch's thread pool, as in a network, and on
a GPU it keeps the device busy while the host launches the call, so that launch time is not counted:
where a busy host takes longer, it is read more often.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
Sampler = Callable[[Call], float]

PATIENCE = 5.0
MOST_FLUSHES = 8
"""How often a GPU's cache is flushed before a run, at most, to keep it busy while the host launches that."""
_L2_OF_A_CORE = 2 << 20  # bytes, where the machine does not say
_L2_FILE = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


@dataclass(frozen=True)
class Timing:
    """A measured time: `seconds` is the lower quartile of `repeats` runs.

    `spread` is the interquartile range over that (0 for fewer than three runs).
    """

    seconds: float
    spread: float
    repeats: int


def summarize(samples: Sequence[float]) -> Timing:
    """The `Timing` of some runs, each in seconds; at least one."""
    if len(samples) < 3:
        return Timing(min(samples), 0.0, len(samples))
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(low, (high - low) / low if low > 0 else 0.0, len(samples))


def measure(
    call: Call,
    sample: Sampler,
    seconds: float,
    *,
    above: float | None = None,
    min_repeats: int = 5,
    max_repeats: int = 50,
) -> Timing:
    """Run `call` repeatedly for about `seconds`, each run timed by `sample`.

    The first run is a warm-up and is not counted, unless it alone uses up the budget.  Fewer than
    `min_repeats` are made only where they would take `PATIENCE` times the budget.  `above` gives up
    early: a call that is slower than that in its first three runs is not measured further.
    """
    samples = [sample(call)]
    warm_ups = 1 if samples[0] < seconds else 0
    while len(samples) - warm_ups < max_repeats:
        enough = len(samples) - warm_ups >= min_repeats
        if sum(samples) >= (seconds if enough else PATIENCE * seconds):
            break
        if above is not None and len(samples) == 3 and min(samples) > above:
            return Timing(min(samples), 0.0, 3)
        samples.append(sample(call))
    return summarize(samples[warm_ups:])


def sampler(device: str) -> Sampler:
    """The function that times one cold run of a call on `device` ("cpu" or "cuda"), in seconds."""
    return _ColdRuns(_flush()) if device == "cuda" else _cpu_sampler()


def _cpu_sampler() -> Sampler:
    # PyTorch splits the sum evenly over its threads: each core reads twice its own L2.
    flush = torch.zeros(2 * l2_bytes() * torch.get_num_threads() // 4, dtype=torch.float32)

    def sample(call: Call) -> float:
        flush.sum()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return sample


def event_sampler(lead: Call | None = None) -> Sampler:
    """The function that times a call between two events of the current GPU, in seconds.

    `lead` is queued before: it keeps the device busy while the host launches what is timed.
    """
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample(call: Call) -> float:
        if lead:
            lead()
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    return sample


class _ColdRuns:
    """Times a call on the current GPU behind so many flushes that they outlast its launch.

    A run that the host launched too late is made again behind twice as many; where launching takes a small
    part of them only, the next has half as many.
    """

    def __init__(self, flush: Call) -> None:
        self.flush = flush
        behind_another = event_sampler(flush)
        self.lasting = min(behind_another(flush) for _ in range(3))
        self.flushes = 1
        self._began = 0.0
        self._sample = event_sampler(self._lead)

    def __call__(self, call: Call) -> float:
        launched = 0.0

        def launch() -> None:
            nonlocal launched
            call()
            launched = time.perf_counter()

        while True:
            seconds = self._sample(launch)
            taken, hidden = launched - self._began, self.flushes * self.lasting
            if taken <= hidden or self.flushes >= MOST_FLUSHES:
                break
            self.flushes *= 2
        if self.flushes > 1 and 4 * taken < hidden:
            self.flushes //= 2
        return seconds

    def _lead(self) -> None:
        self._began = time.perf_counter()
        for _ in range(self.flushes):
            self.flush()


def _flush() -> Call:
    """Reads four times the L2 of the current GPU, so that it also outlasts the host's launch of a call."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    count = max(int(getattr(properties, "L2_cache_size", 0)), 32 << 20)
    return torch.zeros(count, dtype=torch.float32, device="cuda").sum


def l2_bytes(file: Path = _L2_FILE) -> int:
    """The size of one core's L2 cache as the system states it; 2 MiB where it does not."""
    try:
        text = file.read_text().strip()
        return int(text.removesuffix("K")) << 10 if text.endswith("K") else int(text)
    except (OSError, ValueError):
        return _L2_OF_A_CORE
