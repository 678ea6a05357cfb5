"""A real Dynamo on the CPU for each test. Run with `make e2e`, which brings the environment."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from deployment import Deployment

#: Logs of failed tests stay here.
LOGS = Path(__file__).parents[2] / "build" / "e2e"

_NEEDED = ("vllm", "dynamo", "requests", "prometheus_client")
_MISSING = [name for name in _NEEDED if find_spec(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _MISSING:
        return
    reason = f"needs {', '.join(_MISSING)}: `make e2e` has an environment with them"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def terminated_as_interrupted() -> Iterator[None]:
    """Let a SIGTERM, such as a CI's time limit, end the processes as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(scope="session")
def model() -> Path:
    from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, resolve_model

    return resolve_model(BUILTIN_SMOLLM2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[None]:  # the generator's value is the report
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


_FAILED = pytest.StashKey[bool]()


@pytest.fixture
def deploy(model: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Deployment]]:
    """Make deployments; when the test ends, so do they, and the logs of a failed one stay."""
    from deployment import Deployment

    deployments: list[Deployment] = []
    with ExitStack() as stack:

        def start(*router: str) -> Deployment:
            name = request.node.name.translate(str.maketrans("/[]", "___"))
            deployment = Deployment(LOGS / name / str(len(deployments)), model, router)
            deployments.append(stack.enter_context(deployment))
            return deployment

        yield start
    for deployment in deployments:
        if request.node.stash.get(_FAILED, True):
            deployment.print_logs()
        else:
            deployment.remove_logs()
