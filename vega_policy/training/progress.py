"""What a user watches: a progress bar, metrics.jsonl and the boards of `loggers.py`."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from vega_policy.training.loggers import Board
from vega_policy.training.run_folder import METRICS, forget_metrics_after

BAR_INTERVAL = 0.5
"""Least seconds between two refreshes of the bar."""


class Progress:
    """Averages what the steps report between two log lines and writes it in three places.

    Values named `loss`, `gate` and so on become `train/<name>` on the boards. In a process that is not the
    main one nothing is shown or written.
    """

    def __init__(self, run: Path, first: int, steps: int, boards: Sequence[Board], *, shown: bool) -> None:
        """Opens the logs.

        Args:
            run: The run's folder.
            first: Steps made before; later lines of an earlier start are dropped.
            steps: Steps of the whole run.
            boards: Where curves and films go.
            shown: Whether this process shows and writes anything.
        """
        self._boards, self._shown = boards, shown
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._waited = self._steps = 0.0
        self._since = time.perf_counter()
        self._bar = tqdm(
            total=steps,
            initial=first,
            desc="Training",
            unit="step",
            mininterval=BAR_INTERVAL,
            disable=not shown,
        )
        if shown:
            forget_metrics_after(run, first)
            self._file = (run / METRICS).open("a")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Notes one optimizer step.

        Args:
            step: Its number, from 1.
            values: What it reports; a value that is not finite is left out of the means.
        """
        self._steps += 1
        for name, value in values.items():
            counted = math.isfinite(value)
            self._sums[name] = self._sums.get(name, 0.0) + (value if counted else 0.0)
            self._counts[name] = self._counts.get(name, 0) + counted
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """Writes one line of values to all places.

        Args:
            step: Step they belong to.
            values: The values; those that are not finite are left out.
            group: Heading on the boards.
        """
        if not self._shown:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for board in self._boards:
            board.scalars(step, {f"{group}/{name}": value for name, value in values.items()})
        shown = {
            name: f"{value:.4g}" for name, value in values.items() if not name.startswith("learning_rate")
        }
        self._bar.set_postfix(shown, refresh=False)

    def film(self, step: int, name: str, path: Path) -> None:
        """Shows a film on all boards."""
        for board in self._boards:
            board.film(step, name, path)

    def close(self) -> None:
        """Flushes and closes the logs."""
        self._bar.close()
        if self._shown:
            self._file.close()
        for board in self._boards:
            board.close()

    def interval(self) -> dict[str, float]:
        """Means since the last call, steps per second and the share of time spent waiting for data.

        A value that was never finite in between has no mean: it is NaN.
        """
        now = time.perf_counter()
        seconds = now - self._since
        means = {
            name: total / self._counts[name] if self._counts[name] else math.nan
            for name, total in self._sums.items()
        }
        means |= {"steps_per_s": self._steps / seconds, "data_wait_percent": 100 * self._waited / seconds}
        self._sums, self._counts, self._steps, self._waited, self._since = {}, {}, 0.0, 0.0, now
        return means
