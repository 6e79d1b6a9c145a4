"""Stages of rollouts and of given rows: rows that join groups, or take the place of others."""
