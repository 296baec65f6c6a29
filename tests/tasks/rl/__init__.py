"""Preferences and reinforcement learning."""
