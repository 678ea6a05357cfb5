"""The demo: the whole way of a KV block on a small real model, measured.

Owns: the conversation, the measurements around it, their table, JSON and plots. Does not own: anything that
serves; it drives the same `TierAdapter` as every host adapter.
"""
