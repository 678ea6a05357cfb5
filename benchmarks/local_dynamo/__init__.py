"""Parts of a real Dynamo on this machine, for the simulation and for tests/e2e."""
