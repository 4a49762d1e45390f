"""The whole loop: demonstrations, training, closed-loop evaluation with the blind control, in one command.

`make demo` calls this. Each stage is a command that can be run by itself, and is skipped or gone on with
where its output is there already.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
OUTPUT = Path("outputs/demo")
STAGES = {
    "collect": ["collect_demos.py", "env=lift_wide", "episodes_per_task=100"],
    "train": ["train_policy.py", "experiment=demo", f"output_dir={OUTPUT}/train", "resume=true"],
    "evaluate": [
        "eval_policy.py",
        f"checkpoint={OUTPUT}/train/checkpoints/last",
        "env=lift_wide",
        "control=[none,blind]",
        f"output_dir={OUTPUT}/eval",
    ],
}


def main() -> None:
    """Run the three stages; stop at the first that fails."""
    seconds = {}
    for stage, (script, *arguments) in STAGES.items():
        print(f"\n== {stage}: python scripts/{script} {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        code = subprocess.call([sys.executable, str(SCRIPTS / script), *arguments])
        if code:
            sys.exit(
                f"{stage} ended with exit code {code}; `make demo` goes on from here when started again."
            )
        seconds[stage] = round(time.monotonic() - start, 1)
    path = OUTPUT / "eval" / "summary.json"
    summary = json.loads(path.read_text())
    summary["seconds_by_stage"], summary["seconds_total"] = seconds, round(sum(seconds.values()), 1)
    path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{sum(seconds.values()):.0f} s in all {seconds}; pictures: {path.with_name('report.html')}")


if __name__ == "__main__":
    main()
