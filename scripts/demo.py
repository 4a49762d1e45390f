"""Collect and render demonstrations, train a policy, evaluate it also blind: the stages of `make demo`.

Each stage is a command that can be run by itself. A finished stage is skipped, an interrupted one resumes.
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
        "format=states",  # rendered afterwards, only the frames that training reads
        "episodes_per_task=200",
        f"root={OUTPUT}/demonstrations",
    ],
    "render": [
        "render_demos.py",
        f"{OUTPUT}/demonstrations.safetensors",
        f"root={OUTPUT}/demonstrations",
        "repo_id=vega/lift_wide",
        "frame_size=128",
        "rendering=fast",
        "frame_stride=2",
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
    """Seconds that each stage took, summed over all starts of the demo and kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 1)
        write_json(self.path, self.seconds)


def run(clock: Clock) -> None:
    """Run the stages; stop at the first that fails. Print seconds, and the paths of videos and report."""
    for number, (stage, (script, *arguments)) in enumerate(STAGES.items(), start=1):
        print(
            f"\n[{number}/{len(STAGES)}] {stage}: python scripts/{script} {' '.join(arguments)}", flush=True
        )
        start = time.monotonic()
        code = subprocess.call([sys.executable, str(SCRIPTS / script), *arguments])
        clock.add(stage, time.monotonic() - start)
        if code:
            sys.exit(f"{stage} ended with exit code {code}; `make demo` resumes here when started again.")
        print(f"{stage}: {clock.seconds[stage]:.0f} s", flush=True)
    path = OUTPUT / "eval" / "summary.json"
    summary = json.loads(path.read_text())
    summary["seconds_by_stage"] = clock.seconds
    summary["seconds_total"] = round(sum(clock.seconds.values()), 1)
    write_json(path, summary)
    print(f"\n{summary['seconds_total']:.0f} s in all: {clock.seconds}")
    print(f"videos: {path.with_name('videos')}\nreport: {path.with_name('report.html')}")


def main() -> None:
    """Parse the time of the start, and run."""
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
