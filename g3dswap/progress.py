"""The progress bar of tuning: which pass, how many trials, the best time against PyTorch's, time left."""

from __future__ import annotations

import contextlib
from types import TracebackType

from tqdm import tqdm

from .tc.trial import Progress


class Bar:
    """One bar over all passes that are still to be chosen; its unit is seconds of the tuning budget.

    Passes that need no tuning advance it at once, so that the time left is that of real tuning.
    `enabled=False` shows nothing, and so does a run that never tunes.
    """

    def __init__(self, enabled: bool = True, passes: int = 1) -> None:
        self.enabled = enabled
        self.passes = passes
        self._done = 0
        self._bar: tqdm | None = None

    def update(self, name: str, progress: Progress) -> None:
        """Show how the tuning of the pass called `name` is going.

        A display that cannot be written to (a log file on a full disk) is given up.
        """
        if not self.enabled:
            return
        try:
            self._show(name, progress)
        except OSError:
            self.enabled, self._bar = False, None

    def _show(self, name: str, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(
                desc="tuning",
                bar_format="{desc} |{bar:12}| {postfix} [{elapsed}<{remaining}]",
                leave=False,
                dynamic_ncols=True,
            )
        self._bar.total = max(self.passes, self._done + 1) * progress.seconds
        self._bar.n = self._done * progress.seconds + min(progress.elapsed, progress.seconds)
        self._bar.set_description_str(
            f"tuning {self._done + 1}/{max(self.passes, self._done + 1)} {name}", False
        )
        self._bar.set_postfix_str(describe(progress), refresh=False)
        self._bar.refresh()

    def advance(self) -> None:
        """One pass is chosen, tuned or not."""
        self._done += 1
        if self._done >= self.passes:
            self.close()

    def close(self) -> None:
        """Take the bar off the screen; a later update opens a new one."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe(progress: Progress) -> str:
    """ "12 trials, best 0.12 ms, PyTorch 0.50 ms (4.2x)"."""
    text = f"{progress.trials} trials"
    if progress.best is not None:
        text += f", best {milliseconds(progress.best)}"
    if progress.baseline is not None:
        text += f", PyTorch {milliseconds(progress.baseline)}"
    if progress.best and progress.baseline:
        text += f" ({progress.baseline / progress.best:.1f}x)"
    return text


def milliseconds(seconds: float) -> str:
    """A time with three significant digits, in ms."""
    return f"{seconds * 1e3:#.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"
