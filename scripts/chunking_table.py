"""How much a slow policy loses, without a clock: `python scripts/chunking_table.py CHECKPOINT --thinking 8`.

Sync, real-time chunking as deploy_policy.py does it, and as LeRobot's own engine joins them; same episodes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.rtc import RTCConfig

import envs
from envs.base import EVALUATION_SEED
from vega_policy.deployment.latency_benchmark import WAYS, Clockless, frames_to_batch
from vega_policy.evaluation.policies import find_checkpoint, load_lerobot_policy
from vega_policy.evaluation.stats import wilson_interval
from vega_policy.modeling_vega import VegaPolicy


def main() -> None:
    """Print successes with 95% Wilson intervals, mean length, and mean number of steps without command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--suite", default="lift_wide")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--thinking", type=int, default=8, help="steps from a view until its plan is there")
    parser.add_argument("--threshold", type=int, default=10, help="actions left that make it ask again")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--frame-size", type=int, default=128)
    options = parser.parse_args()
    loaded = load_lerobot_policy(find_checkpoint(options.checkpoint), device="cpu")
    policy = loaded.policy
    assert isinstance(policy, VegaPolicy), f"expected a policy of type vega, got {policy.name}"
    environment = envs.make(options.suite, 0, frame_size=options.frame_size, rendering="fast")

    @torch.no_grad()
    def predict(seen: dict[str, Any], delay: int, left: Any) -> tuple[Any, Any]:
        inputs = loaded.preprocessor(frames_to_batch(seen, environment.task.instruction))
        chunk = policy.predict_action_chunk(inputs, inference_delay=delay, prev_chunk_left_over=left)
        return chunk[0], loaded.postprocessor(chunk)[0]

    print("| way | success | 95% interval | steps | without command |\n|---|---|---|---|---|")
    for name in options.ways:
        policy.use_rtc(None if name == "sync" else RTCConfig())
        worlds = [Clockless(environment, predict, options.thinking) for _ in range(options.episodes)]
        for episode, world in enumerate(worlds):
            torch.manual_seed(episode)  # of a flow's noise
            environment.reset_blindly(seed=EVALUATION_SEED + episode)
            WAYS[name](world, action_steps=policy.config.n_action_steps, threshold=options.threshold)
        won, number = sum(world.success for world in worlds), len(worlds)
        interval = wilson_interval(won, number)
        steps, held = (sum(getattr(world, field) for world in worlds) / number for field in ("steps", "held"))
        between = f"{100 * interval.low:.0f} to {100 * interval.high:.0f}%"
        print(f"| {name} | {won}/{number} | {between} | {steps:.1f} | {held:.1f} |", flush=True)


if __name__ == "__main__":
    main()
