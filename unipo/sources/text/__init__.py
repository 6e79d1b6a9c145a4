"""Rollouts of text: sampling, what is kept of it, whole or in parts, now or ahead."""
