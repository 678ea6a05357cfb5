"""Offline calibration: a model and text in, an artifact out.

Owns loading the model, capturing its keys and values, their statistics, the fit of bases and bit plans,
the artifact's format and its report. Does not own the codec that uses the parameters, nor anything that
runs while requests are served: there, only `artifact` is imported.
"""
