"""Sync against real-time chunking on the simulated robot, with a policy that is made slower.

`python scripts/compare_inference.py checkpoint=outputs/demo/train/checkpoints/last --episodes 50` plays
blocks of both in turn, so that what else the machine does meets both, and ends in a table. Started again,
it goes on where it stopped. Further fields of configs/deploy.yaml can be given: `robot.device.seed=1`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from vega_policy.deployment.latency_benchmark import claim, read_runs, whole_episodes
from vega_policy.deployment.latency_benchmark import log_table as table

KINDS = {"sync": ["inference=sync"], "rtc": ["inference=rtc", "inference.queue_threshold=12"]}


def main() -> None:
    """Play what is missing, then print successes with 95% Wilson intervals."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fields", nargs="+", metavar="FIELD=VALUE", help="fields of configs/deploy.yaml")
    parser.add_argument("--episodes", type=int, default=50, help="of each kind")
    parser.add_argument("--block", type=int, default=10, help="episodes of one kind before the other's turn")
    parser.add_argument("--seconds", type=float, default=6.0, help="of an episode")
    parser.add_argument(
        "--extra-latency", type=float, default=0.3, help="seconds that a prediction takes more"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/inference"))
    options = parser.parse_args()
    played = {"fields": options.fields, "seconds": options.seconds, "extra_latency": options.extra_latency}
    try:
        claim(options.output, played)
    except ValueError as error:
        sys.exit(str(error))
    logs = {kind: options.output / kind / "vega_sim.jsonl" for kind in KINDS}
    while (played := min(len(whole_episodes(log)) for log in logs.values())) < options.episodes:
        end = min(played // options.block * options.block + options.block, options.episodes)
        for kind, log in logs.items():
            done = len(whole_episodes(log))
            if done < end:
                command = [sys.executable, str(Path(__file__).with_name("deploy_policy.py"))]
                command += ["robot=vega_sim", "task=lift the red cube", *KINDS[kind]]
                command += [f"robot.device.first_episode={done}", f"episodes={end - done}"]
                command += [f"episode_seconds={options.seconds}", f"output_dir={log.parent}"]
                command += [f"extra_latency_seconds={options.extra_latency}", *options.fields]
                if (failed := subprocess.run(command, check=False).returncode) != 0:
                    sys.exit(failed)
                if len(whole_episodes(log)) <= done:
                    sys.exit(f"no episode was added to {log}; see above")
    print(table([read_runs(kind, log, options.episodes) for kind, log in logs.items()]))


if __name__ == "__main__":
    main()
