"""Options and fixtures of all tiers."""

import gc
import importlib.util
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from ray_cluster import RayCluster

# Deadlines of single examples say more of the machine than of the code.
hypothesis.settings.register_profile("keepstep", deadline=None, print_blob=True)
hypothesis.settings.load_profile("keepstep")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-rewrite", action="store_true", help="write the expected sides of golden scripts anew"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported and collected stays: the garbage collector need not look at it, now or later."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.fixture
def golden_rewrite(request: pytest.FixtureRequest) -> bool:
    """Whether to write what comes out instead of comparing it; a person reads the difference."""
    return bool(request.config.getoption("--golden-rewrite"))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], RayCluster]]:
    """A real Ray cluster that tests share and add their own nodes to; begun by the first that calls it."""
    begun: list[RayCluster] = []

    def begin() -> RayCluster:
        if importlib.util.find_spec("ray") is None:
            pytest.skip("Ray is not installed: make .venv/.ray")
        if not begun:
            begun.append(RayCluster(tmp_path_factory.mktemp("ray"), kept=True))
        return begun[0]

    yield begin
    for cluster in begun:
        cluster.close()
