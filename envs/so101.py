"""SO-101: picking up a cube with the package lerobot-env-so101, under joint positions in LeRobot's units."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

import gymnasium
import numpy as np

from envs.base import ManipulationEnv, Task
from envs.rendering import CameraRig, check_package, load_mujoco, profile, quiet_import

VERSION = "0.4.0"
SUITE, HORIZON = "so101_pick_cube", 160
CAMERA, COLLISION_GROUP = "front", 3  # of the package's scene
CONTROL_PERIOD = 0.05  # s
CAMERA_POSITION, CAMERA_TARGET = (0.46, -0.36, 0.40), (0.20, 0.0, 0.07)  # m
CELL = 0.004  # m; vertices of a mesh within a cell are drawn as one by the profile "fast"
ABOVE, GRASP_HEIGHT, LIFT = 0.05, 0.012, 0.135  # m above the cube's centre at its start
CLEARANCE = 0.010  # m of the fixed jaw from the cube's side; the moving jaw then closes the gap
OPEN, CLOSED = 60.0, 0.0  # percent
MAX_LEAD = 8.0  # degrees by which a command is ahead of a joint's position
CLOSING_STEPS, HOLDING_STEPS, MOST_STEPS = 8, 20, 45
SHOULDER = 0.039  # m, x of the first joint's vertical axis
IK_START = (0.0, 0.0, 30.0, 70.0, 0.0)  # degrees, near all grasps
TILTED = 0.01  # m/rad, where the gripper need not point straight down
APPROACH_AXIS, JAW_AXIS = 0, 2  # of the package's site `gripperframe`
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
NAMES = tuple(f"{joint}.pos" for joint in JOINTS)
"""Entries of state and action, as LeRobot's `so101_follower` names them."""


def tasks(suite: str) -> list[Task]:
    """List the one task."""
    return [Task(suite, 0, "pick_cube", "pick up the cube", HORIZON)]


def make(task: Task, *, frame_size: int, rendering: str, render: bool) -> SO101Env:
    """Build the environment of a task; see `envs.make`."""
    return SO101Env(task, frame_size=frame_size, rendering=rendering, render=render)


class SO101Env(ManipulationEnv):
    """An SO-101 arm and a cube, under position control at 20 Hz.

    Model and start are those of the package's `SO101PickPlace-v0`: jaws with pads, and a cube anywhere in the
    area (15 x 20 cm) over which the gripper can point down. Success is that of its `SO101PickCube-v0`: the
    cube is 10 cm higher than at the start and within 5 cm of the gripper.

    An action is the target of each joint in LeRobot's units: degrees from the middle of its range, and the
    gripper from 0 (closed) to 100 (open). The state is the joints' positions in the same units. The one
    camera is the package's `front`, moved closer so that the whole area is in view.
    """

    action_size: ClassVar[int] = len(JOINTS)
    state_size: ClassVar[int] = len(JOINTS)
    robot_type: ClassVar[str] = "so101_follower"
    action_names: ClassVar[tuple[str, ...] | None] = NAMES
    state_names: ClassVar[tuple[str, ...] | None] = NAMES
    noise_unit: ClassVar[float] = 10.0  # degrees, about 5 cm at the gripper
    position_unit: ClassVar[str] = "degrees"

    def __init__(self, task: Task, *, frame_size: int, rendering: str, render: bool) -> None:
        super().__init__(task, cameras=(CAMERA,) if render else (), frame_size=frame_size)
        chosen = profile(rendering)
        self._mujoco = load_mujoco()
        package = _load_package()
        self.raw = package.SO101PickPlaceGymEnv(random_block_position=True)
        self.model, self.data = self.raw.model, self.raw.data
        self._is_picked = package.SO101PickCubeGymEnv._is_success
        self._substeps = round(CONTROL_PERIOD / self.model.opt.timestep)
        low, high = (self.from_radians(limit) for limit in self.model.actuator_ctrlrange.T)
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        if not render:
            return
        camera = self.model.camera(CAMERA)
        camera.pos, camera.quat = CAMERA_POSITION, _look_at(CAMERA_POSITION, CAMERA_TARGET)
        if not chosen.shadows:
            _simplify_meshes(self.model, CELL)
        self.camera_rig = CameraRig(
            self.model,
            self.data,
            {CAMERA: CAMERA},
            frame_size=frame_size,
            rendering=chosen,
            hidden_groups=(COLLISION_GROUP,),
        )

    def from_radians(self, angles: np.ndarray) -> np.ndarray:
        """Return joint angles [6] (rad, the model's) in LeRobot's units, float32."""
        low, high = self.model.actuator_ctrlrange[-1]
        values = np.degrees(angles)
        values[-1] = 100.0 * (angles[-1] - low) / (high - low)
        return values.astype(np.float32)

    def _to_radians(self, values: np.ndarray) -> np.ndarray:
        low, high = self.model.actuator_ctrlrange[-1]
        angles = np.radians(values)
        angles[-1] = low + values[-1] / 100.0 * (high - low)
        return angles

    def holding_action(self, last: np.ndarray | None) -> np.ndarray:
        """Return the last action [6] again, or the present position."""
        return self._proprioception().astype(np.float64) if last is None else last

    def _reset_simulator(self, seed: int, options: dict[str, Any]) -> None:
        self.raw.reset(seed=seed)
        # the package leaves the gripper's target at the middle of its joint, where it would open at once
        self.data.ctrl[-1] = self.data.qpos[len(JOINTS) - 1]

    def _advance(self, action: np.ndarray) -> bool:
        self.data.ctrl[:] = self._to_radians(action)
        self._mujoco.mj_step(self.model, self.data, self._substeps)
        return self._is_picked(self.raw)

    def _proprioception(self) -> np.ndarray:
        return self.from_radians(self.data.qpos[: len(JOINTS)])


class CubePicker:
    """Scripted demonstrator: above the cube, down to it, close, lift, hold.

    The package's own controller moves its Cartesian action, which this environment does not have. Joint
    angles come from the package's inverse kinematics, solved in a copy of the state.
    """

    def __init__(self, env: SO101Env) -> None:
        self._env = env
        self._scratch = env._mujoco.MjData(env.model)

    def commands(self, attempts: int) -> Iterator[tuple[np.ndarray, float]]:
        """Yield actions [6] and their share of action noise in [0, 1], until the cube was held for 1 s."""
        for _ in range(attempts):
            cube = self._env.data.body("block").xpos.copy()
            cube[1] -= CLEARANCE
            up = np.array([0.0, 0.0, 1.0])
            grasp = self._pose(cube + GRASP_HEIGHT * up)
            # the wrist cannot point straight down at any height
            above, lifted = (self._pose(cube + height * up, TILTED, grasp) for height in (ABOVE, LIFT))
            yield from self._go(above, OPEN, within=3.0)
            yield from self._go(grasp, OPEN, within=1.0, noise_share=0.3)
            for _ in range(CLOSING_STEPS):
                yield self._command(grasp, CLOSED), 0.0
            yield from self._go(lifted, CLOSED, within=2.0, noise_share=0.3)
            for _ in range(HOLDING_STEPS):
                if not self._env.success:
                    break
                yield self._command(lifted, CLOSED), 0.3
            else:
                return

    def _pose(self, point: np.ndarray, weight: float = 0.1, start: np.ndarray | None = None) -> np.ndarray:
        """Return the arm's joint angles [5] (rad) with the point between the jaws at a place [3] (m).

        `weight` is the position error (m) that counts as much as a tilt of 1 rad; `start` [5] (rad)
        is where the search begins.
        """
        env, raw = self._env, self._env.raw
        from lerobot_env_so101 import ik_control  # pyright: ignore[reportMissingImports]

        self._scratch.qpos[:] = env.data.qpos
        return ik_control.compute_ik_levenberg_marquardt(
            env.model,
            self._scratch,
            raw._ee_site_id,
            raw._arm_dof_ids,
            point,
            self._search_start(point) if start is None else start,
            damping=1e-3,
            max_iterations=60,
            point_offset=raw._ik_point_offset,
            approach_axis=APPROACH_AXIS,
            orientation_weight=weight,
        )

    def _search_start(self, point: np.ndarray) -> np.ndarray:
        """Return angles [5] (rad) near a grasp at a place [3] (m); the jaws close along the y axis."""
        env, raw, scratch = self._env, self._env.raw, self._scratch
        from lerobot_env_so101 import ik_control  # pyright: ignore[reportMissingImports]

        angles = np.radians(IK_START)
        angles[0] = -np.arctan2(point[1], point[0] - SHOULDER)
        scratch.qpos[: len(angles)] = angles
        env._mujoco.mj_forward(env.model, scratch)
        angles[-1] += ik_control.roll_to_align_axis(
            scratch, raw._ee_site_id, raw._roll_joint_id, JAW_AXIS, np.array([0.0, 1.0, 0.0])
        )
        return angles

    def _go(
        self, pose: np.ndarray, gripper: float, *, within: float, noise_share: float = 1.0
    ) -> Iterator[tuple[np.ndarray, float]]:
        """Move the arm to a pose [5] (rad) until all joints are `within` degrees of it."""
        for _ in range(MOST_STEPS):
            if np.degrees(np.abs(pose - self._env.data.qpos[: len(pose)])).max() < within:
                return
            yield self._command(pose, gripper), noise_share

    def _command(self, pose: np.ndarray, gripper: float) -> np.ndarray:
        """Return the action [6] that moves the arm towards a pose [5] (rad), all joints at one rate.

        Position actuators give way to gravity by its torque over their gain, which is added.
        """
        env, arm = self._env, slice(len(pose))
        present = env.data.qpos[arm]
        step = pose - present
        step *= min(1.0, np.radians(MAX_LEAD) / max(np.abs(step).max(), 1e-9))
        gains = env.model.actuator_gainprm[arm, 0]
        targets = np.append(present + step + env.data.qfrc_bias[arm] / gains, 0.0)
        action = env.from_radians(targets).astype(np.float64)
        action[-1] = gripper
        return action


def _load_package() -> ModuleType:
    check_package(f"suite {SUITE} needs", "lerobot-env-so101", VERSION, "so101-sim")
    load_mujoco()
    with quiet_import():
        import lerobot_env_so101  # pyright: ignore[reportMissingImports]

    return lerobot_env_so101


def _look_at(position: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """Return the quaternion [4] (w x y z) of a camera at a position that looks at a target, z upwards."""
    from scipy.spatial.transform import Rotation

    backward = np.subtract(position, target)
    right = np.cross([0.0, 0.0, 1.0], backward)
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    return Rotation.from_matrix(axes / np.linalg.norm(axes, axis=0)).as_quat(scalar_first=True)


def _simplify_meshes(model: Any, cell: float) -> None:
    """Draw one vertex a cubic cell of each mesh; the physics is untouched.

    The arm has 320,000 triangles, which take a software renderer 70 ms a frame. MuJoCo reads triangles only
    to render and to cast rays; it collides convex hulls.
    """
    for mesh in range(model.nmesh):
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        cells = np.round(model.mesh_vert[first : first + count] / cell)
        _, members, cell_of = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        triangles = members[cell_of.ravel()][model.mesh_face[first : first + count]]
        corners = np.sort(triangles, axis=1)
        kept = np.unique(corners, axis=0, return_index=True)[1]
        kept = np.sort(kept[(np.diff(corners[kept], axis=1) > 0).all(axis=1)])
        model.mesh_face[first : first + len(kept)] = triangles[kept]
        model.mesh_facenormal[first : first + len(kept)] = model.mesh_facenormal[first : first + count][kept]
        model.mesh_facenum[mesh] = len(kept)
