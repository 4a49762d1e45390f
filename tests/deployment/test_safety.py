"""No command is outside the robot's limits, whatever a policy predicts."""

import dataclasses
import logging
import math
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vega_policy.deployment.safety import (
    SHORTEST_STEP,
    EmergencyStop,
    JointLimits,
    SafetyFilter,
    UnsafeStartError,
    Watchdog,
    Workspace,
    limits_from_episodes,
    read_limits,
)

logger = logging.getLogger(__name__)
PERIOD = 0.05
JOINTS = (
    JointLimits("pan.pos", -1.5, 1.5, speed=2.0, acceleration=20.0, jump=1.0),
    JointLimits("lift.pos", 0.0, 2.0, speed=1.0, acceleration=4.0),
    JointLimits("grip.pos", 0.0, 1.0, jump=0.7),
)
START = {"pan.pos": 0.2, "lift.pos": 1.0, "grip.pos": 0.5}
HAND = Workspace(
    (-0.1, -0.1, 0.8), (0.1, 0.1, 1.1), ("x.pos", "y.pos", "z.pos"), ("x.vel", "y.vel", "z.vel"), 0.05
)
DELTAS = (
    *(JointLimits(f"{axis}.vel", -1, 1, speed=40.0, rest=0.0) for axis in "xyz"),
    JointLimits("gripper.pos", -1, 1, start=-1),
)

numbers = st.floats(allow_nan=True, allow_infinity=True, width=64)
near = st.floats(-3, 3)
names = st.sampled_from([limit.name for limit in JOINTS])
actions = st.one_of(
    st.fixed_dictionaries({limit.name: near for limit in JOINTS}),
    st.fixed_dictionaries({limit.name: numbers for limit in JOINTS}),
    st.dictionaries(names, numbers),
)
denormals = st.floats(-2.3e-308, 2.3e-308)
swapped = st.permutations(list(START.values())).map(lambda values: dict(zip(START, values, strict=True)))
actions |= st.fixed_dictionaries({limit.name: denormals for limit in JOINTS}) | swapped
waits = st.sampled_from([0.0, 5e-324, 1e-12, 1e-6, 0.01, 0.049, 0.05, 0.051, 0.3, 5.0])
clock_faults = st.sampled_from([-1e-6, -0.05, -3600.0, math.nan, -math.inf])


streams = st.lists(st.tuples(actions, waits | clock_faults, st.booleans()), min_size=1, max_size=60)
patience = st.sampled_from(
    [3, 10, 10**9]
)  # refusals in a row that stop the robot for good: soon, late, never


@settings(max_examples=150, deadline=None)
@given(streams, patience)
def test_no_stream_of_actions_leads_outside_position_speed_or_acceleration(stream, refusals):
    check_stream(stream, refusals)


@pytest.mark.slow
def test_no_long_search_finds_a_command_outside_position_speed_or_acceleration(caplog):
    """Its figures are shown with `-o log_cli=true -o log_cli_level=INFO`."""
    caplog.set_level(logging.ERROR, "vega_policy.deployment.safety")  # it logs each refusal
    total = Counter()

    @settings(max_examples=5_000, deadline=None, database=None)
    @given(streams, patience)
    def search(stream, refusals):
        total.update(check_stream(stream, refusals))
        total["streams"] += 1

    search()
    logger.info("%s", dict(total))
    for kind in ("moved", "finite", "keys", "jump", "stale", "range", "speed", "stop"):
        assert total[kind] > 100, kind  # the search reaches every branch


def check_stream(stream, refusals):
    """Check every command, and return how often what happened.

    Each step has an action, the wait of the clock before it, and whether the camera delivers: else its last
    frame, and with it the observation's time, is frozen.
    """
    age = 0.5
    safety = SafetyFilter(JOINTS, period=PERIOD, max_observation_age=age, refusals_to_stop=refusals)
    low, high, speed, acceleration = (
        np.array([vars(limit)[field] for limit in JOINTS])
        for field in ("low", "high", "speed", "acceleration")
    )
    seen = Counter(commands=len(stream))
    clock, since, before, velocity = 0.0, None, np.array(list(START.values())), np.zeros(3)
    safety.set_observation_time(clock)
    for action, wait, delivers in stream:
        now = clock + wait
        seen["clock without a number"] += not math.isfinite(now)
        seen["clock backwards"] += now < clock
        seen["clock stopped"] += now == clock
        seen["camera frozen"] += not delivers
        clock = now if math.isfinite(now) else clock
        if delivers:
            safety.set_observation_time(now)
        named = safety.command(action, START, now)
        command = np.array([named[limit.name] for limit in JOINTS])
        assert np.isfinite(command).all()
        assert ((low <= command) & (command <= high)).all()
        dt = PERIOD if since is None else min(now - since, PERIOD)
        if math.isnan(now) or dt < SHORTEST_STEP or now == -math.inf:
            assert (command == before).all()
            continue
        seen["moved"] += bool((command != before).any())
        since = now
        new_velocity = (command - before) / dt
        assert (np.abs(new_velocity) <= speed + 1e-6).all()
        assert (np.abs(new_velocity - velocity) <= acceleration * dt + 1e-6).all()
        before, velocity = command, new_velocity
    return seen + safety.counts


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(*[near | numbers | denormals] * 4, st.booleans()), min_size=1, max_size=40),
    st.tuples(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.floats(0.7, 1.2)),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_no_displacement_leads_the_hand_further_out_of_its_box(stream, start, fault):
    safety = SafetyFilter(DELTAS, period=PERIOD, workspace=HAND, refusals_to_stop=10**9)
    hand, now = np.array(start), 0.0
    for *values, fails in stream:
        now += PERIOD
        measured = [fault, *hand[1:].tolist()] if fails else hand.tolist()
        observation = dict(zip(HAND.position, measured, strict=True))
        command = safety.command(dict(zip([j.name for j in DELTAS], values, strict=True)), observation, now)
        moved = hand + HAND.metres_per_unit * np.array([command[name] for name in HAND.action])
        assert (moved >= np.minimum(hand, HAND.low) - 1e-9).all()
        assert (moved <= np.maximum(hand, HAND.high) + 1e-9).all()
        if fails:
            assert moved[0] == hand[0]
        hand = moved


def test_after_a_time_without_end_the_robot_stands_still():
    safety = SafetyFilter(JOINTS, period=PERIOD)
    first = safety.command(START | {"pan.pos": 0.25}, START, math.inf)
    assert abs(first["pan.pos"] - START["pan.pos"]) <= 2.0 * PERIOD
    for now in (0.0, 1.0, math.inf):
        assert safety.command(START | {"pan.pos": 0.3}, START, now) == first


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_does_not_move_the_robot(poison):
    safety = SafetyFilter(JOINTS, period=PERIOD)
    for step in range(5):
        assert safety.command(START | {"pan.pos": poison}, START, step * PERIOD) == START
    assert safety.counts["finite"] == 5


def test_a_jump_does_not_move_the_robot_and_many_stop_it_for_good():
    safety = SafetyFilter(JOINTS, period=PERIOD, refusals_to_stop=3)
    for step in range(3):
        assert safety.command(START | {"pan.pos": -1.4}, START, step * PERIOD) == START
    assert safety.counts["jump"] == 3
    assert safety.stopped
    assert safety.command(START | {"lift.pos": 1.5}, START, 1.0) == START


def test_reversed_joints_and_other_joints_are_refused():
    safety = SafetyFilter(JOINTS, period=PERIOD)
    reversed_values = dict(zip(START, [0.5, 0.1, 1.9], strict=True))  # values in the wrong order: a jump
    assert safety.command(reversed_values, START, 0.0) == START
    assert safety.command({"elbow.pos": 0.1}, START, 0.05) == START
    assert safety.counts == {"jump": 1, "keys": 1}


def test_an_action_that_rests_on_an_old_observation_is_refused():
    safety = SafetyFilter(JOINTS, period=PERIOD, max_observation_age=0.5)
    safety.set_observation_time(10.0)
    assert safety.command(START | {"pan.pos": 0.25}, START, 10.6) == START
    assert safety.counts == {"stale": 1}
    safety.set_observation_time(10.6)
    assert safety.command(START | {"pan.pos": 0.25}, START, 10.65) != START


@pytest.mark.parametrize("fault", [math.nan, -1e9])
def test_an_observation_without_a_usable_time_is_refused(fault):
    safety = SafetyFilter(JOINTS, period=PERIOD, max_observation_age=0.5)
    safety.set_observation_time(fault)
    assert safety.command(START | {"pan.pos": 0.25}, START, 10.6) == START
    assert not safety.accept_chunk(fault)
    assert safety.counts == {"stale": 1, "stale chunk": 1}


def test_a_robot_whose_clock_ran_backwards_stands_still_until_it_has_caught_up():
    safety = SafetyFilter(JOINTS, period=PERIOD)
    first = safety.command(START | {"pan.pos": 0.25}, START, 10.0)
    assert safety.command(START | {"pan.pos": 0.3}, START, 9.0) == first
    assert safety.command(START | {"pan.pos": 0.3}, START, 10.05) != first


def test_a_box_for_the_hand_needs_limits_at_which_the_hand_stands_still():
    moving = JointLimits("x.vel", 0.1, 1, rest=0.5)
    with pytest.raises(ValueError, match=r"workspace: expected limits around 0.*x\.vel has none"):
        SafetyFilter([moving, *DELTAS[1:]], period=PERIOD, workspace=HAND)


def test_a_moving_robot_brakes_within_its_acceleration():
    safety = SafetyFilter(JOINTS, period=PERIOD)
    wanted = START | {"lift.pos": 2.0}
    positions = [safety.command(wanted, START, step * PERIOD)["lift.pos"] for step in range(8)]
    for step in range(8, 16):
        positions.append(safety.command(wanted | {"grip.pos": math.nan}, START, step * PERIOD)["lift.pos"])
    speeds = np.diff(positions) / PERIOD
    assert speeds.max() > 0.9
    assert np.abs(np.diff(speeds)).max() <= 4.0 * PERIOD + 1e-6
    assert speeds[-1] == 0.0


def test_degrees_for_radians_never_start_the_robot():
    with pytest.raises(UnsafeStartError, match="units"):
        SafetyFilter(JOINTS, period=PERIOD).command(START, START | {"pan.pos": 11.5}, 0.0)


def test_a_robot_that_does_not_report_its_position_is_not_started():
    with pytest.raises(UnsafeStartError, match=r"does not report lift\.pos"):
        SafetyFilter(JOINTS, period=PERIOD).command(START, {"pan.pos": 0.0}, 0.0)


def test_a_person_can_release_a_stopped_robot():
    safety = SafetyFilter(JOINTS, period=PERIOD)
    safety.command(START, START, 0.0)
    safety.stop("test")
    assert safety.command(START | {"pan.pos": 0.3}, START, 0.05) == START
    safety.restart()
    assert safety.command(START | {"pan.pos": 0.3}, START, 0.1)["pan.pos"] > 0.2


def test_what_is_allowed_passes_unchanged():
    safety = SafetyFilter(DELTAS, period=PERIOD, workspace=HAND)
    inside = dict.fromkeys(HAND.position, 0.0) | {"z.pos": 1.0}
    wanted = {"x.vel": 0.5, "y.vel": -0.25, "z.vel": 0.125, "gripper.pos": 1.0}
    assert safety.command(wanted, inside, 0.0) == wanted
    assert not safety.counts


class Robot:
    """Records commands from any thread, with their time."""

    def __init__(self):
        self.commands = []

    def send(self, command):
        self.commands.append((time.monotonic(), command))


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.005)


def test_the_watchdog_holds_a_robot_whose_policy_hangs_and_then_stops_it():
    safety, robot, reasons = SafetyFilter(JOINTS, period=0.02), Robot(), []
    with Watchdog(safety, robot.send, hold_after=0.1, stop_after=0.5, on_stop=reasons.append) as watchdog:
        time.sleep(0.2)
        assert not robot.commands  # no command yet: left alone
        began = time.monotonic()
        robot.send(safety.command(START | {"pan.pos": 0.3}, START))
        wait_until(lambda: len(robot.commands) > 3)
        assert robot.commands[1][0] - began >= 0.1
        assert not reasons
        wait_until(lambda: reasons)
        assert time.monotonic() - began >= 0.5
    assert "no action for 0.5 s" in reasons[0]
    assert len(reasons) == 1
    assert watchdog.holds > 3
    last = robot.commands[-1][1]
    assert safety.command(START | {"pan.pos": 1.0}, START) == last


def test_holds_come_no_faster_than_commands_so_that_none_queues_up_before_the_next_action():
    safety, robot = SafetyFilter(JOINTS, period=0.05), Robot()
    with Watchdog(safety, robot.send, hold_after=0.06, stop_after=9.0, on_stop=robot.send):
        safety.command(START | {"pan.pos": 0.3}, START)
        wait_until(lambda: len(robot.commands) > 6)
    times = [seconds for seconds, _ in robot.commands]
    assert (times[6] - times[0]) / 6 > 0.037


@pytest.mark.parametrize("error", [ConnectionError("gone"), OSError("closed"), RuntimeError()])
def test_the_watchdog_goes_on_watching_when_the_robot_could_not_be_reached(error):
    safety, robot, failures = SafetyFilter(JOINTS, period=0.02), Robot(), [error]

    def send(command):
        if failures:
            raise failures.pop()
        robot.send(command)

    with Watchdog(safety, send, hold_after=0.05, stop_after=9.0, on_stop=robot.send):
        safety.command(START | {"pan.pos": 0.3}, START)
        wait_until(lambda: robot.commands)


def test_the_watchdog_is_quiet_while_actions_come():
    safety, robot = SafetyFilter(JOINTS, period=0.01), Robot()
    with Watchdog(safety, robot.send, hold_after=5.0, stop_after=9.0, on_stop=robot.send):
        for _ in range(10):
            safety.command(START, START)
            time.sleep(0.01)
    assert not robot.commands


def test_the_emergency_stop_does_not_wait_for_a_busy_main_thread():
    safety, robot, stopped = SafetyFilter(JOINTS, period=0.01), Robot(), threading.Event()
    safety.command(START, START)
    handler = signal.getsignal(signal.SIGUSR1)

    def kick():
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    def stop(reason):
        safety.stop(reason)
        stopped.set()

    with (
        EmergencyStop(stop) as emergency,
        Watchdog(safety, robot.send, hold_after=50, stop_after=60, on_stop=lambda _: None),
    ):
        kicker = threading.Thread(target=kick)
        kicker.start()
        sum(range(10_000_000))  # one C call: Python's own signal handlers wait until it is over
        kicker.join()
        assert stopped.wait(10)
        wait_until(lambda: robot.commands)
        emergency.press("x")
    assert safety.stopped == "emergency stop by signal SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_a_key_stops_the_robot():
    reasons = []
    EmergencyStop(reasons.append, key="space").press("a")
    EmergencyStop(reasons.append, key="space").press("space")
    EmergencyStop(reasons.append, key="Space").press("space")
    assert reasons == ["emergency stop by key 'space'"] * 2


@pytest.mark.parametrize(("key", "other"), [("spacebar", "c"), ("space", "shift"), ("C", "c")])
def test_an_unknown_key_or_one_with_two_actions_is_refused(key, other):
    with pytest.raises(ValueError, match=f"keys: expected different ones.*got {key}, {other}"):
        EmergencyStop(print, key=key, others={other: print})


def test_a_terminated_program_stops_the_robot_first():
    reasons = []
    handler = signal.getsignal(signal.SIGTERM)
    with EmergencyStop(reasons.append):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: reasons)
    assert reasons == ["emergency stop by signal SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_velocity_without_a_rest_is_refused():
    with pytest.raises(ValueError, match=r"x\.vel: a velocity that is held keeps the robot moving"):
        SafetyFilter([JointLimits("x.vel", -1.0, 1.0)], period=0.1)


def test_measured_limits_contain_the_demonstrations_and_a_margin():
    seconds = np.linspace(0, 2 * np.pi, 200)
    episodes = [np.stack([-scale * np.cos(seconds), 2 * np.cos(seconds)], axis=1) for scale in (1, 0.5)]
    pan, lift = limits_from_episodes(["pan", "lift"], episodes, fps=20, margin=0.1)
    assert -1.3 < pan.low < -1 < 1 < pan.high < 1.3
    step = 2 * np.pi / 199
    assert lift.speed == pytest.approx(2 * step * 20 * 1.1, rel=0.02)
    assert lift.acceleration == pytest.approx(2 * step**2 * 400 * 1.1, rel=0.05)
    safety = SafetyFilter([pan, lift], period=0.05)
    start = dict(zip(["pan", "lift"], episodes[0][0].tolist(), strict=True))
    for index, action in enumerate(episodes[0]):
        safety.command(dict(zip(["pan", "lift"], action.tolist(), strict=True)), start, index * 0.05)
    assert not safety.counts
    tight = SafetyFilter([pan, dataclasses.replace(lift, speed=1.0)], period=0.05)
    for index, action in enumerate(episodes[0]):
        tight.command(dict(zip(["pan", "lift"], action.tolist(), strict=True)), start, index * 0.05)
    assert tight.counts["speed"] > 10


@pytest.mark.parametrize(
    ("joints", "message"),
    [
        ({"a": {"low": 1, "high": 0}}, "low < high"),
        ({"a": {"low": 0}}, "missing \\['high'\\]"),
        ({"a": {"low": 0, "high": 1, "velocity": 3}}, "unknown fields \\['velocity'\\]"),
        ({"a": {"low": 0, "high": 1, "speed": 0}}, "speed must be positive"),
        ({"a": {"low": 0, "high": 1, "rest": 2}}, "rest must lie in"),
    ],
)
def test_impossible_limits_are_refused(joints, message):
    with pytest.raises(ValueError, match=message):
        read_limits(joints)


def test_limits_of_a_config_are_read():
    (limit,) = read_limits({"a.pos": {"low": 0, "high": 1, "speed": None, "jump": 0.5}})
    assert limit == JointLimits("a.pos", 0.0, 1.0, jump=0.5)
    with pytest.raises(ValueError, match="low < high in x, y, z"):
        Workspace((0, 0, 1), (1, 1, 1), ("x",) * 3, ("x",) * 3, 1.0)
