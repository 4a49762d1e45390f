"""A deployment from its configuration: safety layer, control loop, takeover and recording."""

import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.processor.factory import make_default_processors
from lerobot.rollout.inference.factory import RTCInferenceConfig, SyncInferenceConfig
from lerobot.rollout.robot_wrapper import ThreadSafeRobot
from lerobot.utils.feature_utils import hw_to_dataset_features
from omegaconf import MissingMandatoryValue, OmegaConf

from tests.training_runs import tiny_policy
from vega_policy import resource, run_dir
from vega_policy.deployment.control_loop import SafeRollout, StepClock, creates_scenes, delayed
from vega_policy.deployment.deploy import deploy, make_engine, read_catch_up, read_rollout, read_safety
from vega_policy.deployment.remote_policy import VegaRemoteConfig, VegaRemotePolicy
from vega_policy.deployment.rtc import RealTimeEngine
from vega_policy.deployment.safety import JointLimits, SafetyFilter, safe_action_pipeline
from vega_policy.deployment.server import serve_forever
from vega_policy.modeling_vega import VegaPolicy
from vega_policy.processor_vega import make_vega_pre_post_processors

JOINTS = {"pan.pos": 0.0, "lift.pos": 0.5}
LIMITS = [JointLimits(name, -1.0, 1.0, jump=0.5) for name in JOINTS]


def composed(*overrides):
    with initialize_config_dir(str(resource("configs")), version_base=None):
        config = compose("deploy", ["task=lift it", *overrides])
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_the_safety_layer_is_a_step_of_lerobots_action_pipeline():
    pipeline = safe_action_pipeline(SafetyFilter(LIMITS, period=0.05))
    assert pipeline(({"pan.pos": 0.1, "lift.pos": 0.5}, JOINTS)) == {"pan.pos": 0.1, "lift.pos": 0.5}
    assert pipeline(({"pan.pos": math.nan, "lift.pos": 0.5}, JOINTS)) == {"pan.pos": 0.1, "lift.pos": 0.5}


def test_the_shipped_robots_have_limits_or_require_a_dataset(tmp_path):
    safety = read_safety(composed("robot=vega_sim"))
    command = safety.command(
        {**dict.fromkeys(safety.names, 3.0), "gripper.pos": 1.0},
        {"x.pos": 0.0, "y.pos": 0.39, "z.pos": 1.0},
        0.0,
    )
    assert command["x.vel"] == 1.0
    assert command["y.vel"] == pytest.approx(0.2)  # 1 cm to the edge of the box
    both = composed("robot=vega_sim", f"robot.safety.dataset.root={tmp_path}")
    neither = composed("robot=vega_sim", "robot.safety.joints=null")
    for config in (both, neither):
        with pytest.raises(ValueError, match=r"give either robot\.safety\.joints"):
            read_safety(config)
    with pytest.raises(MissingMandatoryValue, match="port"):
        composed("robot=so101")


def test_only_a_simulated_robot_is_sent_to_its_initial_pose_between_episodes():
    assert creates_scenes({"new_scenes": True, "device": {"type": "vega_sim"}})
    assert not creates_scenes({"new_scenes": False, "device": {"type": "so101_follower"}})
    with pytest.raises(ValueError, match="so101_follower would jump"):
        creates_scenes({"new_scenes": True, "device": {"type": "so101_follower"}})
    with pytest.raises(ValueError, match="got None"):
        creates_scenes({"device": {"type": "vega_sim"}})


def test_an_arm_whose_motor_software_is_missing_names_the_extra(monkeypatch):
    def fail(*given, **options):
        raise ImportError("'feetech-servo-sdk' is required but not installed.\nMore lines.")

    monkeypatch.setattr("vega_policy.deployment.deploy.build_rollout_context", fail)
    arm = ["robot=so101", "robot.device.port=/dev/none", "robot.device.cameras={}"]
    joints = "robot.safety.joints={shoulder_pan.pos: {low: -90, high: 90}}"
    config = composed("server.url=ws://127.0.0.1:1", *arm, joints, "dry_run=true")
    with pytest.raises(
        ImportError, match=r"so10[01]_follower: .*not installed\. Install it: pip .*\[so101\]"
    ) as error:
        deploy(config)
    assert "\n" not in str(error.value)


def test_a_deployment_needs_one_policy():
    with pytest.raises(ValueError, match="either a checkpoint or server"):
        read_rollout(composed())
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_rollout(composed("checkpoint=nowhere"))
    remote = read_rollout(
        composed("server.url=ws://127.0.0.1:1", "inference=rtc", "inference.queue_threshold=8")
    )
    assert (remote.policy.type, remote.policy.url) == ("vega_remote", "ws://127.0.0.1:1")
    assert (remote.inference.type, remote.inference.queue_threshold) == ("rtc", 8)
    assert (remote.robot.type, remote.fps, remote.task) == ("vega_sim", 20, "lift it")
    assert remote.policy.latency_steps == 0
    assert remote.robot.log_file == Path("outputs/deploy/vega_sim.jsonl")


def test_a_policy_leaves_a_core_to_cameras_and_the_control_loop(monkeypatch):
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(run_dir, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with pytest.raises(ValueError, match="either a checkpoint or server"):
        deploy({"checkpoint": None, "server": {"url": None}})
    with initialize_config_dir(str(resource("configs")), version_base=None):
        config = OmegaConf.to_container(compose("serve", ["checkpoint=nowhere"]), resolve=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        serve_forever(config)
    assert chosen == [3, 3]


def test_lerobot_finds_the_remote_policy_and_its_processors_by_type():
    assert get_policy_class("vega_remote") is VegaRemotePolicy
    before, after = make_pre_post_processors(VegaRemoteConfig())
    assert len(before.steps) == len(after.steps) == 1


def test_control_steps_keep_absolute_deadlines_and_late_ones_are_counted():
    now = [0.0]
    clock = StepClock(1.0, lambda: now[0], lambda seconds: now.__setitem__(0, now[0] + seconds))
    begins, missed = [], []
    for seconds in (0.2, 1.3, 0.1, 0.3, 2.6, 0.2):
        now[0] += seconds
        missed.append(clock.wait())
        begins.append(round(now[0], 6))
    assert begins == [1.0, 2.3, 3.0, 4.0, 7.0, 8.0]  # at once if little late, else at the next deadline
    assert missed == [0, 0, 0, 0, 2, 0]


def test_a_delayed_policy_returns_the_same_later():
    assert delayed(lambda one, two: one + two, 0.01)(1, two=2) == 3


class Robot:
    """Two joints that reach a command at once."""

    robot_type = name = "two joints"

    def __init__(self, joints=JOINTS):
        self.joints, self.sent, self.seconds = dict(joints), [], 0.0
        self.action_features = self.observation_features = dict.fromkeys(joints, float)

    def get_observation(self):
        joints = dict(self.joints)
        time.sleep(self.seconds)
        return joints

    def send_action(self, action):
        self.joints = dict(action)
        self.sent.append(action)


class Engine:
    """Returns given actions, one after another; then none."""

    ready, failed = True, False

    def __init__(self, actions):
        self.actions, self.resets, self.seconds = list(actions), 0, 0.0

    def get_action(self, frame):
        time.sleep(self.seconds)
        return torch.tensor(self.actions.pop(0)) if self.actions else None

    def notify_observation(self, observation):
        pass

    def reset(self):
        self.resets += 1

    def start(self):
        pass

    stop = resume = start


def make_context(robot, engine, safety, teleop=None):
    """What LeRobot's rollout passes to its strategies."""
    features = {
        **hw_to_dataset_features(robot.action_features, "action"),
        **hw_to_dataset_features(robot.observation_features, "observation"),
    }
    to_teleop, _, to_observation = make_default_processors()
    return SimpleNamespace(
        runtime=SimpleNamespace(
            cfg=SimpleNamespace(fps=1000, task="test", interpolation_multiplier=1),
            shutdown_event=threading.Event(),
        ),
        hardware=SimpleNamespace(robot_wrapper=ThreadSafeRobot(robot), teleop=teleop),
        policy=SimpleNamespace(inference=engine),
        processors=SimpleNamespace(
            teleop_action_processor=to_teleop,
            robot_action_processor=safe_action_pipeline(safety),
            robot_observation_processor=to_observation,
        ),
        data=SimpleNamespace(dataset_features=features, ordered_action_keys=list(robot.joints)),
    )


def roll_out(engine, steps, *, robot=None, teleop=None, before_step=lambda strategy, step: None, **options):
    """Run some steps, then the end of a rollout; return robot, recorded frames and filter."""
    robot, frames = robot or Robot(), []
    safety = SafetyFilter(LIMITS, period=0.05, **options)
    context = make_context(robot, engine, safety, teleop)
    recorder = SimpleNamespace(add=frames.append, end_episode=lambda: None)
    strategy = SafeRollout(safety, episodes=1, episode_seconds=1.0, recorder=recorder)
    strategy.setup(context)
    strategy.reset()
    for step in range(steps):
        before_step(strategy, step)
        strategy.step(context)
    context.runtime.shutdown_event.set()
    strategy.run(context)
    return robot, frames, safety


def test_a_robot_is_at_rest_before_it_is_released():
    robot, engine, order = Robot({"x.vel": 0.0}), Engine([]), []
    engine.stop = lambda: order.append(len(robot.sent))
    safety = SafetyFilter([JointLimits("x.vel", -1.0, 1.0, speed=2.0, rest=0.0)], period=0.02)
    context = make_context(robot, engine, safety)
    for _ in range(20):
        robot.send_action(safety.command({"x.vel": 1.0}, robot.joints))
        time.sleep(0.02)
    fast = robot.sent[-1]["x.vel"]
    strategy = SafeRollout(safety, episodes=1, episode_seconds=1.0)
    strategy.setup(context)
    strategy.come_to_rest(context)
    assert order == [20]  # inference ended first
    assert fast > 0.3
    assert robot.sent[-1] == {"x.vel": 0.0}
    assert len(robot.sent) > 25  # it braked within its limits


def test_a_robot_that_was_never_commanded_gets_no_command_at_the_end():
    robot, safety = Robot(), SafetyFilter(LIMITS, period=0.05)
    SafeRollout(safety, episodes=1, episode_seconds=1.0).come_to_rest(make_context(robot, None, safety))
    assert robot.sent == []


def test_an_engine_that_failed_stops_the_deployment():
    engine = Engine([[0.1, 0.5]])
    engine.failed = True
    *_, safety = roll_out(engine, steps=1)
    assert "inference failed" in safety.stopped


def test_commands_and_actions_of_the_policy_are_recorded():
    robot, frames, _ = roll_out(Engine([[0.1, 0.5], [math.nan, 0.5], [0.2, 0.6]]), steps=4)
    assert len(robot.sent) == len(frames) == 3  # a step without a prediction commands and records nothing
    assert [bool(frame["intervention"][0]) for frame in frames][:2] == [False, True]
    np.testing.assert_allclose(frames[0]["action"], [0.1, 0.5])
    np.testing.assert_allclose(frames[1]["action"], [0.1, 0.5])
    np.testing.assert_allclose(frames[1]["policy_action"], [0.0, 0.5])
    np.testing.assert_allclose(frames[1]["observation.state"], [0.1, 0.5])


def relative_policy():
    """A policy of two joints and one camera whose actions are relative, and its processors."""
    config = tiny_policy(use_relative_actions=True)
    config.input_features = {
        "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    stats = {"mean": [1.0, -1.0], "std": [2.0, 3.0], "min": [-4.0, -2.0], "max": [4.0, 6.0]}
    stats = {name: torch.tensor(values) for name, values in stats.items()}
    processors = make_vega_pre_post_processors(config, {"observation.state": stats, "action": stats})
    policy = VegaPolicy(config)
    policy.config.rtc_config = RTCConfig()
    return policy, processors


def plan_two_chunks(inference):
    """Two chunks of a relative policy, one action executed between: engine, what each was given, plans."""
    policy, (preprocess, postprocess) = relative_policy()
    safety = SafetyFilter(LIMITS, period=0.1, max_observation_age=1e9)
    context = make_context(Robot(), None, safety)
    context.policy = SimpleNamespace(policy=policy, preprocessor=preprocess, postprocessor=postprocess)
    context.runtime.cfg = SimpleNamespace(fps=10, task="lift", device="cpu", inference=inference)
    image = {"dtype": "video", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    context.data.dataset_features["observation.images.front"] = image
    engine, given, planned = make_engine(context, safety, 0), [], []
    predict = policy.predict_action_chunk

    def remember(batch, **rtc):
        given.append(rtc)
        return predict(batch, **rtc)

    def keep(chunk):
        planned.append(postprocess(chunk))
        return planned[-1]

    policy.predict_action_chunk, context.policy.postprocessor = remember, keep
    frame = {"front": np.zeros((32, 32, 3), np.uint8)}
    for pan in (0.0, 7.0):
        safety.set_observation_time(time.monotonic())
        engine.notify_observation({**frame, "pan.pos": pan, "lift.pos": 0.5})
        engine.predict_if_due()
        if pan == 0.0:
            engine.get_action(None)  # the first of four actions is executed, three are left
    return engine, given, planned, postprocess


def test_catch_up_is_refused_for_positions_of_joints_and_relative_to_the_state():
    policy, (preprocess, postprocess) = relative_policy()
    safety = SafetyFilter(LIMITS, period=0.1, max_observation_age=1e9)
    context = make_context(Robot(), None, safety)
    context.policy = SimpleNamespace(policy=policy, preprocessor=preprocess, postprocessor=postprocess)
    assert read_catch_up({"catch_up": []}, context, safety) == ()
    with pytest.raises(ValueError, match="catch_up: expected a list of indices of actions, from 0 to 1; got"):
        read_catch_up({"catch_up": [2]}, context, safety)
    refused = r"catch_up=\[0\]: expected .* displacements, got positions: pan\.pos\. Leave them out"
    with pytest.raises(ValueError, match=refused):  # whatever predicts them, a server too
        read_catch_up({"catch_up": [0]}, context, safety)
    context.data.ordered_action_keys = ["pan.vel", "lift.vel"]
    with pytest.raises(ValueError, match="since the policy's actions are positions relative to the state"):
        read_catch_up({"catch_up": [0]}, context, safety)
    preprocess.steps = [step for step in preprocess.steps if not getattr(step, "enabled", False)]
    assert read_catch_up({"catch_up": [0]}, context, safety) == (0,)


def test_in_real_time_chunking_relative_actions_under_way_are_relative_to_the_new_state():
    _, given, planned, postprocess = plan_two_chunks(RTCInferenceConfig(queue_threshold=4))
    assert given[0]["prev_chunk_left_over"] is None
    restored = postprocess(given[1]["prev_chunk_left_over"][None])  # adds the state that was observed last
    torch.testing.assert_close(restored, planned[0][:, 1:], atol=1e-5, rtol=1e-5)


def test_inference_async_predicts_without_the_last_chunk_in_the_same_engine():
    inference = read_rollout(composed("server.url=ws://127.0.0.1:1", "inference=async")).inference
    assert (inference.type, inference.queue_threshold) == ("rtc", 10)
    engine, given, planned, _ = plan_two_chunks(inference)
    assert given == [{}, {}]
    assert isinstance(engine, RealTimeEngine)
    torch.testing.assert_close(engine.get_action(None), planned[1][0, 0])


def test_lerobots_refusal_of_relative_actions_without_real_time_chunking_is_not_ours(monkeypatch):
    seen = []

    def build(rollout, *given, **options):  # LeRobot 0.6.1 raises NotImplementedError for SyncInferenceConfig
        seen.append(type(rollout.inference))
        raise ConnectionError("no robot")

    monkeypatch.setattr("vega_policy.deployment.deploy.build_rollout_context", build)
    for relative in (True, False):
        policy = SimpleNamespace(use_relative_actions=relative)
        rollout = SimpleNamespace(policy=policy, inference=SyncInferenceConfig(), robot=None)
        monkeypatch.setattr("vega_policy.deployment.deploy.read_rollout", lambda config, one=rollout: one)
        with pytest.raises(ConnectionError, match="no robot"):
            deploy(composed("robot=vega_sim", "server.url=ws://127.0.0.1:1"))
        assert isinstance(rollout.inference, SyncInferenceConfig)  # the engine that is made afterwards
    assert seen == [RTCInferenceConfig, SyncInferenceConfig]


def test_a_person_takes_over_and_returns_control():
    def switch(strategy, step):
        if step in (1, 3):
            strategy.toggle_human()

    engine = Engine([[0.1, 0.5]] * 9)
    teleop = SimpleNamespace(get_action=lambda: {"pan.pos": -0.1, "lift.pos": 0.4})
    robot, frames, _ = roll_out(engine, steps=5, teleop=teleop, before_step=switch)
    assert [bool(frame["intervention"][0]) for frame in frames][:3] == [False, True, True]
    np.testing.assert_allclose(frames[2]["policy_action"], [-0.1, 0.4])
    assert engine.resets == 4  # at the start (twice), and at each change of control
    assert len(robot.sent) == 5


@pytest.mark.parametrize("slow_part", ["policy", "camera"])
def test_an_action_from_an_old_observation_is_refused_and_predicted_again(slow_part):
    robot, engine = Robot(), Engine([[0.1, 0.5], [0.2, 0.5], [0.15, 0.5]])

    def slow(strategy, step):
        part = robot if slow_part == "camera" else engine
        part.seconds = 0.6 if step == 1 else 0.0

    _, _, safety = roll_out(engine, steps=3, robot=robot, before_step=slow, max_observation_age=0.5)
    assert safety.counts["stale"] == 1
    assert robot.sent[1] == robot.sent[0]
    assert robot.sent[2]["pan.pos"] > robot.sent[1]["pan.pos"]
    assert engine.resets == 3
