"""Replay of multi-turn conversations through the real stack, against doing without it."""
