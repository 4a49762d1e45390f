"""Replay demonstrations open loop: `python scripts/replay_demos.py DATASET`.

Recorded actions are executed from the recorded initial states: an end-to-end check of actions, states and
gripper sign.
"""

from pathlib import Path

from omegaconf import DictConfig

from vega_policy.cli.app import Command


def run(config: DictConfig) -> str:
    """Return failures and the number of successes."""
    from envs.demos.shards import collected_metadata, read_episodes
    from vega_policy.evaluation.env_pool import EnvironmentFactory, RecordedEpisode, WorkerPool, replay

    dataset = Path(config.source)
    if collected_metadata(dataset)["settings"]["demonstrator"]["noise"]:
        raise ValueError(
            f"{dataset} was collected with action noise: the recorded actions are not the executed ones."
        )
    episodes = [
        RecordedEpisode(
            stored.task.suite,
            stored.task.name,
            stored.task.index,
            stored.recording.seed,
            stored.recording.states[0],
            stored.recording.actions,
        )
        for stored in read_episodes(dataset, config.episodes)
    ]
    lines, successes = [], 0
    with WorkerPool(EnvironmentFactory("envs.make", 128, "fast"), config.processes) as pool:
        for episode, success in replay(episodes, pool, num_envs=config.processes):
            successes += success
            if not success:
                lines.append(f"failed: {episode.task}, seed {episode.seed}, {len(episode.actions)} actions")
    return "\n".join([*lines, f"{successes} of {len(episodes)} replayed demonstrations succeed"])


main = Command(
    config="replay",
    run=run,
    summary="Replay the recorded actions of demonstrations from their initial states.",
    examples=["python scripts/replay_demos.py outputs/demonstrations/libero_spatial processes=16"],
    node={
        "source": "???",  # dataset of collect_demos.py
        "episodes": None,  # indices; null replays all
        "processes": 2,
    },
    positional=("source",),
).main

if __name__ == "__main__":
    main()
