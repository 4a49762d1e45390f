"""Replay demonstrations open loop through the evaluation's workers: `scripts/replay_demos.py DATASET`.

What was recorded must succeed again from its recorded initial state: a check of actions, states and gripper
sign from end to end.
"""

import argparse
import sys
from pathlib import Path

from envs.demos.replay import collected_metadata, read_episodes
from vega_policy.evaluation.env_pool import EnvironmentFactory, RecordedEpisode, WorkerPool, replay


def main() -> None:
    """Replay, then print the failures and the count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, help="a dataset that scripts/collect_demos.py wrote")
    parser.add_argument("--episodes", type=int, nargs="*", help="indices of episodes; all if not given")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    try:
        if collected_metadata(options.dataset)["settings"]["demonstrator"]["noise"]:
            parser.error("played with action noise: the recorded, clean actions are not those executed")
        stored = read_episodes(options.dataset, options.episodes)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    recorded = [
        RecordedEpisode(
            e.task.suite,
            e.task.name,
            e.task.index,
            e.recording.seed,
            e.recording.states[0],
            e.recording.actions,
        )
        for e in stored
    ]
    successes = 0
    with WorkerPool(EnvironmentFactory("envs.make", 128, "fast"), options.processes) as pool:
        for episode, success in replay(recorded, pool, num_envs=options.processes):
            successes += success
            if not success:
                print(f"failed: {episode.task}, seed {episode.seed}, {len(episode.actions)} actions")
    print(f"{successes} of {len(recorded)} replayed demonstrations succeed")


if __name__ == "__main__":
    main()
