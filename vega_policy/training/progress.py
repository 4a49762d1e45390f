"""What a user watches: a progress bar, metrics.jsonl and TensorBoard."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vega_policy.training.run_folder import METRICS, forget_metrics_after

BAR_INTERVAL = 0.5
"""Least seconds between two refreshes of the bar."""


class Progress:
    """Averages what the steps report between two log lines and writes it in three places.

    Values named `loss`, `gate` and so on become `train/<name>` in TensorBoard. In a process that is not the
    main one nothing is shown or written.
    """

    def __init__(self, run: Path, first: int, steps: int, *, log_every: int, shown: bool) -> None:
        """Opens the logs.

        Args:
            run: The run's folder.
            first: Steps made before; later lines of an earlier start are dropped.
            steps: Steps of the whole run.
            log_every: Steps between two log lines.
            shown: Whether this process shows and writes anything.
        """
        self.log_every, self._shown = log_every, shown
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
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1)

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
            values: What it reports.
        """
        self._steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._bar.update()
        if step % self.log_every == 0 or step == self._bar.total:
            self.write(step, self._interval())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line of values to all three places."""
        if not self._shown:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        shown = {name: f"{value:.4g}" for name, value in values.items() if name != "learning_rate"}
        self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Flushes and closes the logs."""
        self._bar.close()
        if self._shown:
            self._file.close()
            self._board.close()

    def _interval(self) -> dict[str, float]:
        """Means since the last log line, steps per second and the share of time spent waiting for data."""
        now = time.perf_counter()
        seconds = now - self._since
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        means |= {"steps_per_s": self._steps / seconds, "data_wait_percent": 100 * self._waited / seconds}
        self._sums, self._counts, self._steps, self._waited, self._since = {}, {}, 0.0, 0.0, now
        return means
