"""One folder per host system.

Owns: the translation between a host's calls and `pipeline.TierAdapter`. Does not own: logic that another
adapter would need too.
"""
