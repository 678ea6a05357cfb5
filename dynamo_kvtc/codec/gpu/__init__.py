"""The codec on an NVIDIA GPU: the same streams, made and read without uncompressed KV leaving the device.

Owns: Triton kernels, bases on the device, entropy coding in batches, streams and events. Does not own: the
format (`dynamo_kvtc.codec`), files and transfers, and any engine. Importing this package needs neither Triton
nor a GPU; its modules need Triton, and a GPU or Triton's interpreter to run. `docs/gpu.md` tells the whole.
"""
