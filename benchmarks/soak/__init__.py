"""Hundreds of concurrent sessions against the whole pipeline: does anything grow, starve or block?

python -m benchmarks.soak                    ten minutes
python -m benchmarks.soak --seconds 20       a quick look
"""
