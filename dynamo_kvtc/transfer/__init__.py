"""NIXL, and nothing but NIXL.

Owns: the agent and its single poller, registered memory and files, awaitable transfers with deadlines,
the staging pool. Does not own: what the bytes mean, where objects lie in an arena or a file.
"""
