"""A robot other than the policy's fails the preflight before it moves."""

import dataclasses
import math

import numpy as np
import pytest

from vega_policy.deployment.preflight import (
    FAILED,
    OK,
    WARNING,
    PolicySpec,
    RobotSpec,
    Timing,
    check_robot,
    format_checks,
    measure_latency,
)
from vega_policy.deployment.rtc import LAST_COMMAND
from vega_policy.deployment.safety import JointLimits, SafetyFilter

NAMES = ("pan.pos", "lift.pos", "elbow.pos", "grip.pos")
RANGE = np.array([[-1.0, 0.2, -2.0, 0.0], [1.0, 1.2, -0.5, 1.0]])
FRONT = "observation.images.front"
POLICY = PolicySpec({FRONT: (480, 640)}, NAMES, NAMES, 4, 4, RANGE, RANGE, 16, fps=30.0)
STATE = dict(zip(NAMES, [0.1, 0.9, -1.8, 0.5], strict=True))
ROBOT = RobotSpec({FRONT: (480, 640)}, STATE, NAMES)
LIMITS = [JointLimits(name, low - 0.1, high + 0.1) for name, low, high in zip(NAMES, *RANGE, strict=True)]
CHUNK = np.tile(list(STATE.values()), (16, 1))
TIMING = Timing(30.0, [0.01] * 5, False, 0)


def check(policy=POLICY, robot=ROBOT, limits=LIMITS, chunk=CHUNK, timing=TIMING):
    checks = check_robot(policy, robot, limits, chunk, timing)
    assert len(format_checks(checks).splitlines()) == len(checks)
    return {item.name: item for item in checks}


def failed(**changes):
    return {name: item.message for name, item in check(**changes).items() if item.status == FAILED}


def robot(**changes):
    return dataclasses.replace(ROBOT, **changes)


def test_the_robot_it_was_trained_on_passes():
    assert {item.status for item in check().values()} == {OK}


def test_missing_and_misnamed_cameras_fail_and_further_ones_do_not():
    assert "name them alike" in failed(robot=robot(cameras={"observation.images.top": (480, 640)}))["cameras"]
    assert not failed(robot=robot(cameras={FRONT: (480, 640), "observation.images.top": (1, 1)}))


def test_another_shape_of_frame_fails_and_another_size_warns():
    assert "another shape" in failed(robot=robot(cameras={FRONT: (640, 480)}))[FRONT]
    assert check(robot=robot(cameras={FRONT: (240, 320)}))[FRONT].status == WARNING


def test_reversed_joints_fail_by_name_and_without_names_by_value():
    backwards = dict(reversed(STATE.items()))
    assert "another order" in failed(robot=robot(state=backwards))["joints of the state"]
    assert "another order" in failed(robot=robot(action_names=NAMES[::-1]))["joints of the action"]
    nameless = dataclasses.replace(POLICY, state_names=None, action_names=None)
    failures = failed(policy=nameless, robot=robot(state=backwards))
    assert "Check units, order" in failures["state within the training range"]


def test_degrees_for_radians_fail_with_a_hint():
    degrees = {name: math.degrees(value) for name, value in STATE.items()}
    assert "degrees for radians" in failed(robot=robot(state=degrees))["state within the training range"]
    degrees_policy = dataclasses.replace(POLICY, state_range=np.degrees(RANGE))
    assert "radians for degrees" in failed(policy=degrees_policy)["state within the training range"]


def test_a_robot_with_other_joints_fails():
    assert "the robot 3" in failed(robot=robot(state=dict(list(STATE.items())[:3])))["joints of the state"]
    other = robot(action_names=("a", "b", "c", "d"))
    assert "the robot has" in failed(robot=other)["joints of the action"]
    assert "limits are for" in failed(robot=other)["limits against the training data"]


def test_limits_that_do_not_fit_the_training_data_warn():
    name = "limits against the training data"
    wide = [dataclasses.replace(limit, low=-50, high=50) for limit in LIMITS]
    assert "three times as wide" in check(limits=wide)[name].message
    narrow = [dataclasses.replace(LIMITS[0], low=-0.2, high=0.2), *LIMITS[1:]]
    assert "narrower" in check(limits=narrow)[name].message


def test_a_first_chunk_that_is_not_finite_or_outside_fails():
    name = "first actions within limits"
    assert "not finite" in failed(chunk=CHUNK * math.nan)[name]
    assert "units and order" in failed(chunk=np.degrees(CHUNK))[name]
    edges = np.array([limit.high + 0.05 * (limit.high - limit.low) for limit in LIMITS])
    assert check(chunk=np.broadcast_to(edges, CHUNK.shape))[name].status == OK, "a little beyond is cut"
    assert name in failed(chunk=np.broadcast_to(2 * edges, CHUNK.shape))


def test_another_control_rate_than_that_of_the_data_is_reported():
    name = "control rate against the training data"
    found = check(policy=dataclasses.replace(POLICY, fps=15.0))[name]
    assert (found.status, found.message) == (
        WARNING,
        "trained at 15 steps a second, the robot runs at 30; set fps=15",
    )
    assert check(policy=dataclasses.replace(POLICY, fps=None))[name].status == WARNING


def test_latency_is_measured_against_the_rate():
    name = "latency against the control rate"
    slow = Timing(30.0, [0.3] * 5, False, 0)
    assert check(timing=slow)[name].status == WARNING
    assert (
        "longer than a chunk of 16 lasts" in failed(timing=dataclasses.replace(slow, latencies=[0.6]))[name]
    )
    rtc = dataclasses.replace(slow, real_time_chunking=True, queue_threshold=8)
    assert "9 steps" in failed(timing=rtc)[name]
    enough = dataclasses.replace(rtc, queue_threshold=12)
    assert "lower robot.fps" in failed(timing=enough)[name]  # a chunk of 16 is spent within two of 9
    fast = dataclasses.replace(enough, latencies=[0.2])
    assert check(timing=fast)[name].status == OK
    assert "lower robot.fps" in failed(timing=dataclasses.replace(fast, latency_steps=5))[name]
    blind = dataclasses.replace(fast, observing=[0.04] * 5)
    assert "an observation takes 40 ms, a step 33 ms" in failed(timing=blind)[name]
    beyond = dataclasses.replace(slow, real_time_chunking=True, queue_threshold=30)
    assert "must be below the chunk" in failed(timing=beyond)[name]


class Arm:
    """Follows each command at once; its observations are `late` steps old."""

    def __init__(self, late, moves=True):
        self.states, self.moves = [dict(STATE)] * (late + 1), moves
        self.farthest = 0.0

    def get_observation(self):
        observed, self.states = self.states[0], [*self.states[1:], self.states[-1]]
        return dict(observed)

    def send_action(self, action):
        if self.moves:
            self.states[-1] = dict(action)
            self.farthest = max(self.farthest, abs(action["pan.pos"] - STATE["pan.pos"]))


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_small_motion_shows_by_how_many_steps_observations_are_late(late):
    arm, safety = Arm(late), SafetyFilter(LIMITS, period=0.002)
    steps, result = measure_latency(arm, safety, motion=0.02)
    assert (steps, result.status) == (late, OK)
    assert 0 < arm.farthest < 0.05  # of a range of 2.2
    assert safety.last_command == {}  # the policy begins as if nothing had moved


def test_without_a_visible_motion_the_latency_is_unknown_and_a_reporting_robot_need_not_move():
    steps, result = measure_latency(Arm(0, moves=False), SafetyFilter(LIMITS, period=0.001), motion=0.02)
    assert (steps, result.status) == (0, FAILED)
    assert "set robot.latency_steps" in result.message
    arm = Arm(2)
    arm.get_observation = lambda: {**STATE, LAST_COMMAND: 0}
    assert measure_latency(arm, SafetyFilter(LIMITS, period=0.001), motion=0.02)[0] == 0
    assert arm.farthest == 0.0
    with pytest.raises(ValueError, match=r"preflight\.motion: .*got 0\.5"):
        measure_latency(arm, SafetyFilter(LIMITS, period=0.001), motion=0.5)
