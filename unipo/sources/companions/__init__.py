"""Models that are trained beside the policy and tell it something."""
