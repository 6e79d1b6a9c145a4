"""How Stable-Baselines3 and SBX tell the meter."""

from __future__ import annotations

from stable_baselines3.common.callbacks import BaseCallback

from benchmarks.control.side import Meter


class Timed(BaseCallback):
    """Tells the meter of every rollout: an update of PPO follows it, one of SAC goes before the next."""

    def __init__(self, meter: Meter, per_rollout: int) -> None:
        super().__init__()
        self.meter, self.per_rollout, self.begun = meter, per_rollout, False

    def _on_rollout_start(self) -> None:
        self.going = self.meter.add(self.per_rollout) if self.begun else True
        self.begun = True

    def _on_step(self) -> bool:
        return self.going
