"""Triton kernels and their launchers, one idea a file; each names the CPU code that it must agree with.

Owns: what runs on the device's cores. Does not own: memory, streams, the order of launches.

Every kernel is persistent: a grid of at most `dynamo_kvtc.codec.gpu.device.GpuDevice.programs` programs
walks over all tiles, so that the engine keeps the rest of the SMs. Without a GPU the kernels run in Triton's
interpreter (``TRITON_INTERPRET=1``, set before this package is imported), on CPU tensors.
"""
