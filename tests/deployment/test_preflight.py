"""A robot that is not the one the policy was trained on is found out before it moves."""

import dataclasses
import math

import numpy as np

from vega_policy.deployment.preflight import FAILED, OK, WARNING, Pace, Present, Trained, preflight, report
from vega_policy.deployment.safety import JointLimits

NAMES = ("pan.pos", "lift.pos", "elbow.pos", "grip.pos")
RANGE = np.array([[-1.0, 0.2, -2.0, 0.0], [1.0, 1.2, -0.5, 1.0]])
FRONT = "observation.images.front"
TRAINED = Trained({FRONT: (480, 640)}, NAMES, NAMES, 4, 4, RANGE, RANGE, 16)
STATE = dict(zip(NAMES, [0.1, 0.9, -1.8, 0.5], strict=True))
PRESENT = Present({FRONT: (480, 640)}, STATE, NAMES)
LIMITS = [JointLimits(name, low - 0.1, high + 0.1) for name, low, high in zip(NAMES, *RANGE, strict=True)]
CHUNK = np.tile(list(STATE.values()), (16, 1))
PACE = Pace(30.0, [0.01] * 5, False, 0)


def check(trained=TRAINED, present=PRESENT, limits=LIMITS, chunk=CHUNK, pace=PACE):
    checks = preflight(trained, present, limits, chunk, pace)
    assert len(report(checks).splitlines()) == len(checks)
    return {item.name: item for item in checks}


def failed(**changes):
    return {name: item.message for name, item in check(**changes).items() if item.status == FAILED}


def present(**changes):
    return dataclasses.replace(PRESENT, **changes)


def test_the_robot_it_was_trained_on_passes():
    assert {item.status for item in check().values()} == {OK}


def test_missing_and_misnamed_cameras_fail_and_further_ones_do_not():
    assert (
        "name them alike"
        in failed(present=present(cameras={"observation.images.top": (480, 640)}))["cameras"]
    )
    assert not failed(present=present(cameras={FRONT: (480, 640), "observation.images.top": (1, 1)}))


def test_another_shape_of_frame_fails_and_another_size_warns():
    assert "another shape" in failed(present=present(cameras={FRONT: (640, 480)}))[FRONT]
    assert check(present=present(cameras={FRONT: (240, 320)}))[FRONT].status == WARNING


def test_reversed_joints_fail_by_name_and_without_names_by_value():
    backwards = dict(reversed(STATE.items()))
    assert "another order" in failed(present=present(state=backwards))["joints of the state"]
    assert "another order" in failed(present=present(action_names=NAMES[::-1]))["joints of the action"]
    nameless = dataclasses.replace(TRAINED, state_names=None, action_names=None)
    found = failed(trained=nameless, present=present(state=backwards))
    assert "Check units, order" in found["state where it was in training"]


def test_degrees_for_radians_fail_and_are_called_so():
    degrees = {name: math.degrees(value) for name, value in STATE.items()}
    assert "degrees for radians" in failed(present=present(state=degrees))["state where it was in training"]
    trained = dataclasses.replace(TRAINED, state_range=np.degrees(RANGE))
    assert "radians for degrees" in failed(trained=trained)["state where it was in training"]


def test_a_robot_with_other_joints_fails():
    assert (
        "the robot 3" in failed(present=present(state=dict(list(STATE.items())[:3])))["joints of the state"]
    )
    other = present(action_names=("a", "b", "c", "d"))
    assert "the robot has" in failed(present=other)["joints of the action"]
    assert "limits are for" in failed(present=other)["limits against the training data"]


def test_limits_that_do_not_fit_the_training_data_are_pointed_out():
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


def test_latency_is_measured_against_the_rate():
    name = "latency against the control rate"
    slow = Pace(30.0, [0.3] * 5, False, 0)
    assert check(pace=slow)[name].status == WARNING
    assert (
        "9 steps" in failed(pace=dataclasses.replace(slow, real_time_chunking=True, queue_threshold=8))[name]
    )
    enough = dataclasses.replace(slow, real_time_chunking=True, queue_threshold=12)
    assert "the robot waits" in check(pace=enough)[name].message  # a chunk of 16 is spent within two of 9
    assert check(pace=dataclasses.replace(enough, latencies=[0.2]))[name].status == OK
    beyond = dataclasses.replace(slow, real_time_chunking=True, queue_threshold=30)
    assert "must be below the chunk" in failed(pace=beyond)[name]
