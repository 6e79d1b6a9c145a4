"""What can be wrong with an environment, said so that it can be mended."""

from __future__ import annotations

from typing import Any


class TaskEnvironmentError(ValueError):
    """An environment that cannot be made or whose spaces are not supported: found before anything is trained."""


class EnvironmentFailure(RuntimeError):
    """An environment that broke while it was being used.

    `env`: its index; `episode`, `step`: where (steps of the running episode that were done before); `action`: the last one
    that it was given, as the environment sees it (None: at a reset).
    """

    def __init__(self, message: str, env: int = -1, episode: int = -1, step: int = -1, action: Any = None) -> None:
        super().__init__(message)
        self.env, self.episode, self.step, self.action = env, episode, step, action

    def with_remedy(self, text: str) -> EnvironmentFailure:
        """The same failure, its message followed by `text`."""
        return EnvironmentFailure(f"{self} {text}", self.env, self.episode, self.step, self.action)


def failure(problem: str, env: int, episode: int, step: int, action: Any = None) -> EnvironmentFailure:
    """The error for `problem`, such as "returned a NaN reward"."""
    after = "at the reset" if action is None else f"at step {step}, after action {_short(action)}"
    message = (
        f"environment {env} {problem} in its episode {episode} {after}. Expected: finite numbers of the shape that the "
        f"space promises, and no exception. The environment has to be mended."
    )
    return EnvironmentFailure(message, env, episode, step, action)


def _short(action: Any) -> str:
    text = " ".join(str(action).split())
    return text if len(text) <= 120 else text[:117] + "..."
