"""Installed as ``sitecustomize`` in the engine environment.

torchvision's wheel is built for CUDA. With a CPU build of torch its import fails, since two operators that
its library would define are missing; their schemas are all that vLLM's imports need. They are defined when
torchvision is first imported, so that no other process pays for importing torch.
"""

import importlib.abc
import importlib.util
import sys


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        global _library
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.util.find_spec(name)


sys.meta_path.insert(0, _AfterTorch())
