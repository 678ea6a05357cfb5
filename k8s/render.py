"""Render the chart for every set of values in ``values/`` into ``manifests/``: ``make manifests``.

The folder of each set is a base for ``kubectl kustomize`` and ``kubectl apply -k``. Needs the package
helm-python-sdk; no cluster and no helm binary.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import helm_python

K8S = Path(__file__).parent
CHART = K8S / "chart"
MANIFESTS = K8S / "manifests"
RELEASE = "kvtc"

_KUSTOMIZATION = (
    "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n- manifests.yaml\n"
)
_HEAD = "# Rendered from k8s/chart with k8s/values/{name}.yaml by `make manifests`; change those instead.\n"


def value_sets() -> dict[str, Path]:
    """Return every set of values by its name."""
    return {path.stem: path for path in sorted((K8S / "values").glob("*.yaml"))}


def read_values(path: Path) -> dict[str, Any]:
    """Read a values file as Helm does."""
    return helm_python.values_from_yaml(path.read_text(encoding="utf-8"))


@functools.cache
def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def render(values: dict[str, Any] | None = None, *, name: str = RELEASE) -> str:
    """Render the chart as one YAML file, without its notes."""
    templates = _chart().render(values or {}, name=name, namespace="default")
    documents = [
        document.strip("\n")
        for path, text in sorted(templates.items())
        if path.endswith(".yaml")
        for document in f"\n{text}\n".split("\n---\n")
        if any(line and not line.startswith("#") for line in document.splitlines())
    ]
    return "".join(f"---\n{document}\n" for document in documents)


def files() -> dict[Path, str]:
    """Return what `MANIFESTS` holds: the content of every file by its path."""
    content: dict[Path, str] = {}
    for name, path in value_sets().items():
        folder = MANIFESTS / name
        content[folder / "manifests.yaml"] = _HEAD.format(name=name) + render(read_values(path))
        content[folder / "kustomization.yaml"] = _KUSTOMIZATION
    return content


def main() -> None:
    """Write every file, and remove what no set of values makes any more."""
    wanted = files()
    for path in MANIFESTS.rglob("*.yaml"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
