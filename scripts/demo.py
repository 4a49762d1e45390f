"""The whole loop: demonstrations, training, closed-loop evaluation with the blind ablation, in one command.

`make demo` calls this. Each stage is a command that can be run by itself, and is skipped or gone on with
where its output is there already.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from vega_policy.run_dir import write_json

SCRIPTS = Path(__file__).resolve().parent
OUTPUT = Path("outputs/demo")
STAGES = {
    "collect": [
        "collect_demos.py",
        "env=lift_wide",
        "episodes_per_task=200",
        f"root={OUTPUT}/demonstrations",
    ],
    "train": ["train_policy.py", "experiment=demo", f"output_dir={OUTPUT}/train", "resume=true"],
    "evaluate": [
        "eval_policy.py",
        f"checkpoint={OUTPUT}/train/checkpoints/last",
        "env=lift_wide",
        "ablations=[none,blind]",
        f"output_dir={OUTPUT}/eval",
    ],
}


class Clock:
    """Seconds that each stage took, over all starts of the demo: it keeps them in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, stage: str, seconds: float) -> None:
        """Count some more seconds for a stage."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 1)
        write_json(self.path, self.seconds)


def run(clock: Clock) -> None:
    """Run the three stages; stop at the first that fails. Then say what it took and where to look."""
    for stage, (script, *arguments) in STAGES.items():
        print(f"\n== {stage}: python scripts/{script} {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        code = subprocess.call([sys.executable, str(SCRIPTS / script), *arguments])
        clock.add(stage, time.monotonic() - start)
        if code:
            sys.exit(
                f"{stage} ended with exit code {code}; `make demo` goes on from here when started again."
            )
    path = OUTPUT / "eval" / "summary.json"
    summary = json.loads(path.read_text())
    summary["seconds_by_stage"] = clock.seconds
    summary["seconds_total"] = round(sum(clock.seconds.values()), 1)
    write_json(path, summary)
    print(f"\n{summary['seconds_total']:.0f} s in all: {clock.seconds}")
    print(f"films:  {path.with_name('videos')}\nreport: {path.with_name('report.html')}")


def main() -> None:
    """Read when the command was started, and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--started",
        type=float,
        default=time.time(),
        help="Unix time at which the command was given; what lies before now counts as installation",
    )
    started = parser.parse_args().started
    clock = Clock(OUTPUT / "seconds.json")
    clock.add("install", max(time.time() - started, 0.0))
    run(clock)


if __name__ == "__main__":
    main()
