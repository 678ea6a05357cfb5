"""Crashes of the disk tier: processes killed at random moments, and writes lost in a simulated power cut.

python -m benchmarks.crash                  500 kills, 500 more with two workers in one folder: tens of
minutes python -m benchmarks.crash --kills 20       a quick look
"""
