"""Rendering: upright images, profiles, restored states, and what happens where rendering cannot run."""

import ctypes
import importlib.metadata
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import envs
from envs import rendering
from vega_policy.benchmarks import rendering_gain
from vega_policy.benchmarks.parts import benchmark_simulate
from vega_policy.config import is_own_error

SIZE = 96


@pytest.fixture(scope="module")
def fast():
    env = envs.make("lift_wide", 0, frame_size=SIZE, rendering="fast")
    env.reset(seed=0)
    yield env
    env.close()


@pytest.fixture(scope="module")
def full():
    env = envs.make("lift_wide", 0, frame_size=SIZE, rendering="full")
    env.reset(seed=0)
    yield env
    env.close()


def projected(env, camera, point):
    """Row and column in an upright image at which a camera sees a point of the world."""
    model, data = env.raw.sim.model, env.raw.sim.data
    index = model.camera_name2id(camera)
    x, y, z = data.cam_xmat[index].reshape(3, 3).T @ (point - data.cam_xpos[index])
    scale = SIZE / 2 / np.tan(np.radians(model.cam_fovy[index]) / 2)
    return SIZE / 2 + y / z * scale, SIZE / 2 - x / z * scale


def red_centre(frame):
    red, green, blue = frame.astype(int).transpose(2, 0, 1)
    rows, columns = np.nonzero((red > 90) & (red > 2 * green) & (red > 2 * blue))
    return rows.mean(), columns.mean()


@pytest.mark.parametrize("position", [(0.1, 0.1), (0.1, -0.1), (-0.05, 0.05)])
def test_images_are_upright_and_the_cube_is_where_the_camera_sees_it(fast, position):
    fast.raw.sim.data.set_joint_qpos("cube_joint0", [*position, 0.83, 1, 0, 0, 0])
    frames = fast.observe()["pixels"]
    expected = projected(fast, "agentview", np.array([*position, 0.83]))
    assert red_centre(frames["image"]) == pytest.approx(expected, abs=2.0)


def test_the_hand_camera_is_upright_too(fast):
    fast.raw.sim.data.set_joint_qpos("cube_joint0", [-0.05, 0.06, 0.83, 1, 0, 0, 0])
    expected = projected(fast, "robot0_eye_in_hand", np.array([-0.05, 0.06, 0.83]))
    assert red_centre(fast.observe()["pixels"]["image2"]) == pytest.approx(expected, abs=2.0)


def test_restoring_a_state_shows_the_same_image_and_the_same_hand(fast):
    fast.reset(seed=4)
    states, observations = [], []
    for action in np.random.default_rng(1).uniform(-1, 1, (6, 7)):
        states.append(fast.simulator_state())
        observations.append(fast.observe())
        fast.step_blindly(action)
    fast.reset(seed=5)
    for state, observation in zip(states, observations, strict=True):
        fast.restore(state)
        again = fast.observe()
        assert np.array_equal(again["agent_pos"], observation["agent_pos"])
        for camera, frame in observation["pixels"].items():
            assert np.array_equal(again["pixels"][camera], frame)


@pytest.mark.parametrize("profile", ["fast", "full"])
def test_frames_of_a_batch_of_states_are_those_of_single_observations(fast, full, profile, monkeypatch):
    monkeypatch.setattr(rendering, "BATCH", 2)
    env = {"fast": fast, "full": full}[profile]
    env.reset_blindly(seed=4)
    states, expected = [], []
    for action in np.random.default_rng(0).uniform(-1, 1, (3, 7)):
        expected.append(list(env.observe()["pixels"].values()))
        states.append(env.simulator_state())
        env.step_blindly(action)
    batches = list(env.camera_rig.render_states(states, env.restore))
    assert [len(batch) for batch in batches] == [2, 1]
    assert np.array_equal(np.concatenate(batches), np.array(expected))


def test_an_episode_can_go_on_from_a_restored_state(fast):
    fast.reset(seed=4)
    state, before = fast.simulator_state(), fast.observe()["agent_pos"]
    fast.reset(seed=5)
    fast.restore(state)
    for _ in range(5):
        fast.step_blindly(np.zeros(7))
    after = fast.observe()["agent_pos"]
    np.testing.assert_allclose(after[:6], before[:6], atol=2e-3)  # the controller holds the pose it finds


def test_what_a_camera_cannot_see_is_not_drawn_and_not_missed(fast, monkeypatch):
    fast.reset(seed=6)
    drawn, hidden = [], []
    for culls in (True, False):
        monkeypatch.setattr(fast.camera_rig, "culls", culls)
        drawn.append(fast.observe()["pixels"])
    for index in fast.camera_rig.cameras.values():
        hidden.append(rendering.out_of_view(fast.model, fast.data, index).mean())
    assert min(hidden) > 0.2
    for camera in ("image", "image2"):
        assert np.array_equal(drawn[0][camera], drawn[1][camera])


def test_profiles_change_the_image_and_not_the_physics(fast, full):
    for env in (fast, full):
        env.reset(seed=8)
        env.step(np.full(7, 0.5))
    assert np.array_equal(fast.simulator_state(), full.simulator_state())
    one, other = (env.observe()["pixels"]["image"].astype(int) for env in (fast, full))
    assert 0 < np.abs(one - other).mean() < 20  # reflections and soft edges
    assert fast.model.light_castshadow.max() == 0 == fast.model.mat_reflectance.max()
    assert fast.model.vis.quality.offsamples == 0 < full.model.vis.quality.offsamples


def test_closing_one_environment_leaves_the_images_of_another_alone(fast):
    before = fast.observe()["pixels"]["image"]
    other = envs.make("lift", 0, frame_size=SIZE, rendering="fast")
    other.reset(seed=0)
    other.close()
    other.close()
    assert np.array_equal(before, fast.observe()["pixels"]["image"])


def test_without_cameras_there_are_no_pixels_and_nothing_to_render():
    env = envs.make("lift", 0, render=False)
    observation, _ = env.reset(seed=0)
    assert list(observation) == ["agent_pos"]
    assert env.observation_space.contains(observation)
    with pytest.raises(RuntimeError, match="render=False"):
        env.render()
    env.close()


def test_observations_fit_their_space(fast):
    assert fast.observation_space.contains(fast.reset(seed=0)[0])
    assert np.array_equal(fast.render(), fast.observe()["pixels"]["image"])


def test_importing_envs_imports_no_simulator():
    script = (
        "import sys, envs, envs.rendering; assert not {'mujoco', 'robosuite', 'lerobot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.slow
def test_a_forgotten_close_is_silent_at_exit():
    script = "import envs; env = envs.make('lift', 0, frame_size=16); env.reset(seed=0); print('made')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


def test_images_are_taken_headless_even_if_mujoco_was_imported_first():
    script = (
        "import mujoco; from envs.rendering import load_mujoco; load_mujoco();"
        "model = mujoco.MjModel.from_xml_string('<mujoco/>');"
        "renderer = mujoco.Renderer(model, 16, 16); renderer.update_scene(mujoco.MjData(model));"
        "print(renderer.render().shape)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment
    )
    assert (done.returncode, done.stdout) == (0, "(16, 16, 3)\n"), done.stderr


def test_another_mujoco_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.17.0")
    with pytest.raises(RuntimeError, match=r"mujoco 3\.3\.7 is needed, found 3\.17\.0: .*other physics"):
        rendering.load_mujoco()


def test_missing_egl_is_reported_with_the_packages_to_install(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match=r"libEGL\.so\.1.*apt-get install libegl1"):
        rendering.check_egl()


@pytest.mark.parametrize("device", ["99", "-1", "x"])
def test_a_device_that_does_not_exist_is_refused_before_anything_is_drawn(monkeypatch, device):
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", device)
    message = (
        rf"rendering cannot start with .*'{device}'.*MUJOCO_EGL_DEVICE_ID: expected a number from 0 to \d"
    )
    with pytest.raises(RuntimeError, match=message) as refused:
        rendering.load_mujoco()
    assert is_own_error(refused.value)


@pytest.mark.parametrize(
    "variables", [{"MUJOCO_GL": "foo"}, {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "foo"}]
)
def test_a_back_end_that_does_not_exist_is_refused_with_the_variables_and_the_known_ones(variables):
    script = "from envs.rendering import load_mujoco; load_mujoco()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
    )
    line = done.stderr.splitlines()[-1]
    assert line.startswith("RuntimeError: rendering cannot start with MUJOCO_GL="), done.stderr
    assert "'foo'" in line
    assert "Expected MUJOCO_GL to be egl, osmesa or glfw" in line


def test_a_driver_that_gives_no_context_is_one_error_of_ours(monkeypatch):
    def broken(width, height):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    env = envs.make("lift", 0, frame_size=16)
    monkeypatch.setattr("mujoco.egl.GLContext", broken)
    with (
        ThreadPoolExecutor(1) as thread,  # which has no context yet
        pytest.raises(
            RuntimeError, match=r"rendering cannot start .*AttributeError: .*eglQueryString"
        ) as failed,
    ):
        thread.submit(env.reset, seed=0).result()
    env.close()
    assert is_own_error(failed.value)


def test_environments_of_a_thread_share_one_context_and_show_what_they_show_alone(monkeypatch):
    made, create = [], rendering.load_mujoco().GLContext
    monkeypatch.setattr("mujoco.egl.GLContext", lambda *size: made.append(size) or create(*size))

    def show(*sizes):
        """Return what environments show when the last one is open, after the others have shown it."""
        opened = [envs.make("lift", 0, frame_size=size, rendering="fast") for size in sizes]
        frames = [env.reset(seed=0)[0]["pixels"]["image"] for env in opened]
        assert np.array_equal(opened[0].observe()["pixels"]["image"], frames[0])
        for env in opened:
            env.close()
        return frames

    with ThreadPoolExecutor(1) as thread:
        small, large = thread.submit(show, 16, 40).result()
    assert len(made) == 1
    assert np.array_equal(small, show(16)[0])
    assert np.array_equal(large, show(40)[0])


def test_unknown_profiles_and_tiny_frames_are_refused():
    with pytest.raises(ValueError, match=r"Unknown rendering profile 'quick'. Known: full, fast"):
        envs.make("lift", 0, rendering="quick")
    with pytest.raises(ValueError, match="at least 8 pixels, got 4"):
        envs.make("lift", 0, frame_size=4)


def test_the_simulate_part_times_both_rendering_profiles_and_no_rendering():
    rows = list(benchmark_simulate(["lift"], 64, seconds=0.01))
    assert [(row["rendering"], row["cameras"]) for row in rows] == [("full", 2), ("fast", 2), ("none", 0)]
    rate = {row["rendering"]: row["steps_per_s"] for row in rows}
    gain = f"{rate['fast'] / rate['full']:.1f}"
    assert rendering_gain(rows) == [f"lift: fast rendering is {gain} times as fast as full"]
