"""How large: tiers, memory, volumes and what they will hold, before anything is deployed.

Owns: the arithmetic of `dynamo-kvtc plan` and the values that it prints for the Helm chart. Does not own:
the chart (`k8s/chart`), and what is measured (`evaluation`): a plan is an estimate from a model's shape.
"""

from dynamo_kvtc.planning.models import KNOWN_MODELS, ModelShape, read_model
from dynamo_kvtc.planning.sizing import Plan, PlanRequest, plan
from dynamo_kvtc.planning.values import chart_values

__all__ = ["KNOWN_MODELS", "ModelShape", "Plan", "PlanRequest", "chart_values", "plan", "read_model"]
