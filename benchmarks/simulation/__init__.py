"""What the tier does to a cluster: Dynamo's real frontend and router over simulated workers.

Dynamo's mocker stands in for the GPUs. Its host tier is sized and timed by what this project measured:
how much smaller tier blocks are, and how much faster onboarding and encoding are than computing the same
tokens.
"""
