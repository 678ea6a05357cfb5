"""Tensors to bytes and back.

Owns: geometry, RoPE and its inverse, transform, quantiser, packing, entropy coders, the bitstream;
a slow reference implementation beside the fast one. Imports torch, numpy and the compression libraries.
Does not own: I/O, asyncio, engines, configuration files, how parameters are calibrated.
"""
