"""How fast the GPU codec is, against floors measured on the same device, and what it was predicted to be.

Owns: shapes, made-up parameters and KV, floors, the measurement, the prediction. Does not own: kernels and
their stages (`dynamo_kvtc.codec.gpu`). Everything but times also runs on a CPU in Triton's interpreter.
"""
