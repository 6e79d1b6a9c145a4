"""Dynamics of Gymnasium's environments for n copies at once: its operations in its order, so that every number is its own.

Known are CartPole, HalfCheetah, Hopper, Swimmer and Walker2d: the pendulum as arrays over the copies; the others by MuJoCo's
physics alone, one copy after the other, with observations and rewards of all copies in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Computation(Protocol):
    """All copies at once. Their own environments still reset them, and could step them."""

    state: Array
    """Of all copies, in float64."""

    def adopt(self, env: int) -> None:
        """The state of copy `env` is that of its own environment now."""

    def step(self, native: Array) -> tuple[Array, Array, Array]:
        """(observation [n, d] float32, reward [n], terminated [n]), in new arrays."""


class CartPoles:
    """`CartPoleEnv` with Euler's method."""

    def __init__(self, envs: Sequence[Any]) -> None:
        self.envs, e, n = envs, envs[0], len(envs)
        self.state, self._slope = np.zeros((4, n)), np.zeros((4, n))  # (x, x_dot, theta, theta_dot) and their changes
        self._scratch = np.zeros((4, n))
        self._force = np.array([-e.force_mag, e.force_mag])
        # NumPy is quicker with arrays than with numbers that it has to convert
        numbers = e.gravity, e.masspole, e.total_mass, e.length, e.polemass_length, 4.0 / 3.0
        self._constants = tuple(np.full(n, number) for number in numbers)
        self._tau, self._bounds = (
            np.full((4, n), e.tau),
            np.full((n, 2), (e.x_threshold, e.theta_threshold_radians)).T.copy(),
        )
        self._fallen, self._standing = (-1.0, 0.0) if e._sutton_barto_reward else (1.0, 1.0)
        self._always = np.full(n, self._standing)
        self._always.flags.writeable = False

    def adopt(self, env: int) -> None:
        self.state[:, env] = self.envs[env].state

    def step(self, native: Array) -> tuple[Array, Array, Array]:
        self._accelerate(self._force[native])
        state, slope = self.state, self._slope
        slope[0::2] = state[1::2]
        slope *= self._tau
        state += slope
        fallen = np.abs(state[0::2]) > self._bounds
        terminated = fallen[0] | fallen[1]
        paid = self._always if self._fallen == self._standing else np.where(terminated, self._fallen, self._standing)
        return state.T.astype(np.float32), paid, terminated

    def _accelerate(self, force: Array) -> None:
        """slope[1] and slope[3]; https://coneural.org/florian/papers/05_cart_pole.pdf"""
        gravity, masspole, total_mass, length, polemass_length, four_thirds = self._constants
        (_, _, theta, theta_dot), (_, xacc, _, thetaacc), (cos, sin, temp, other) = (
            self.state,
            self._slope,
            self._scratch,
        )
        np.cos(theta, cos)
        np.sin(theta, sin)
        np.multiply(theta_dot, theta_dot, temp)  # temp = (force + polemass_length * theta_dot^2 * sin) / total_mass
        temp *= polemass_length
        temp *= sin
        temp += force
        temp /= total_mass
        np.multiply(cos, cos, other)  # other = length * (4 / 3 - masspole * cos^2 / total_mass)
        other *= masspole
        other /= total_mass
        np.subtract(four_thirds, other, other)
        other *= length
        sin *= gravity  # thetaacc = (gravity * sin - cos * temp) / other
        np.multiply(cos, temp, thetaacc)
        np.subtract(sin, thetaacc, thetaacc)
        thetaacc /= other
        np.multiply(thetaacc, polemass_length, other)  # xacc = temp - polemass_length * thetaacc * cos / total_mass
        other *= cos
        other /= total_mass
        np.subtract(temp, other, xacc)


def _cart_poles(envs: Sequence[Any]) -> Computation | None:
    return CartPoles(envs) if envs[0].kinematics_integrator == "euler" else None


class Runners:
    """Paid for how far they get along x, less what their controls cost; they never fall.

    `skipped`: positions that are not observed. Forces after the step (`mj_rnePostConstraint`), which Gymnasium computes too, are
    neither observed nor paid for here.
    """

    def __init__(self, envs: Sequence[Any], skipped: int = 1) -> None:
        e, n = envs[0], len(envs)
        self._physics, self._frames = import_module("mujoco").mj_step, e.frame_skip
        self._bodies = [(x.data.ctrl, x.model, x.data) for x in envs]
        self._parts = [part for x in envs for part in (x.data.qpos, x.data.qvel)]
        self.state = np.zeros((n, e.model.nq + e.model.nv))
        self._flat, self._positions = self.state.reshape(-1), int(e.model.nq)
        self._skipped = skipped if e._exclude_current_positions_from_observation else 0
        self._dt, self._forward, self._cost = e.dt, e._forward_reward_weight, e._ctrl_cost_weight
        self._never = np.zeros(n, dtype=bool)

    def adopt(self, env: int) -> None:
        np.concatenate(self._parts[2 * env : 2 * env + 2], out=self.state[env])

    def step(self, native: Array) -> tuple[Array, Array, Array]:
        before = self.state[:, 0].copy()
        physics, frames = self._physics, self._frames
        for action, (control, model, data) in zip(native, self._bodies, strict=True):
            control[:] = action
            physics(model, data, frames)
        np.concatenate(self._parts, out=self._flat)
        forward = self._forward * ((self.state[:, 0] - before) / self._dt)
        observation, healthy = self.state[:, self._skipped :].astype(np.float32), self._healthy()
        self._shown(observation)
        return observation, self._paid(forward, healthy) - self._cost * np.square(native).sum(1), self._over(healthy)

    def _shown(self, observation: Array) -> None:
        """Observed velocities, where they differ from those of the physics, in place."""

    def _healthy(self) -> Array:
        return self._never

    def _paid(self, forward: Array, healthy: Array) -> Array:
        return forward

    def _over(self, healthy: Array) -> Array:
        return self._never


class Walkers(Runners):
    """Runners that fall, are paid for each step until then, and observe velocities up to +-10."""

    def __init__(self, envs: Sequence[Any]) -> None:
        super().__init__(envs)
        e = envs[0]
        self._bonus, self._ends = e._healthy_reward, e._terminate_when_unhealthy
        (z0, z1), (angle0, angle1) = e._healthy_z_range, e._healthy_angle_range
        self._low, self._high = np.array([z0, angle0]), np.array([z1, angle1])

    def _shown(self, observation: Array) -> None:
        velocity = observation[:, self._positions - self._skipped :]
        np.clip(velocity, -10, 10, out=velocity)

    def _healthy(self) -> Array:
        found = self.state[:, 1:3]
        healthy: Array = np.logical_and.reduce((self._low < found) & (found < self._high), axis=1)
        return healthy

    def _paid(self, forward: Array, healthy: Array) -> Array:
        return forward + healthy * self._bonus

    def _over(self, healthy: Array) -> Array:
        return ~healthy if self._ends else self._never


class Hoppers(Walkers):
    """Walkers whose other positions and velocities have limits too."""

    def __init__(self, envs: Sequence[Any]) -> None:
        super().__init__(envs)
        self._range = envs[0]._healthy_state_range

    def _healthy(self) -> Array:
        state, (low, high) = self.state[:, 2:], self._range
        healthy: Array = super()._healthy() & np.logical_and.reduce((low < state) & (state < high), axis=1)
        return healthy


_MUJOCO = "gymnasium.envs.mujoco."
COMPUTATIONS: dict[str, Callable[[Sequence[Any]], Computation | None]] = {
    "gymnasium.envs.classic_control.cartpole:CartPoleEnv": _cart_poles,
    f"{_MUJOCO}half_cheetah_v5:HalfCheetahEnv": Runners,
    f"{_MUJOCO}swimmer_v5:SwimmerEnv": lambda envs: Runners(envs, skipped=2),
    f"{_MUJOCO}walker2d_v5:Walker2dEnv": Walkers,
    f"{_MUJOCO}hopper_v5:HopperEnv": Hoppers,
}
"""By module and name of an environment's class; None for settings that are not known."""
