"""Where episodes come from: prompts, rollouts, replay, rows, the mixer, filters and controllers."""
