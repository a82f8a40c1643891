"""Clusters for tests that act as a user would: real controllers and agents, ranks really killed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import Cluster
from hosts import missing
from site_of_hosts import Site, standing

_KEPT_MAX = 4  # clusters between tests: their standby servers take memory


class Clusters:
    """A test that leaves its cluster as it found it leaves it to the next one that wants the same."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._kept: list[Cluster] = []

    def take(self, nodes: int = 3, slots: int = 2, **options: object) -> Cluster:
        for cluster in self._kept:
            if cluster.asked == (nodes, slots, options):
                self._kept.remove(cluster)
                return cluster
        return Cluster(self._folder() / "home", nodes=nodes, slots=slots, **options)

    def give(self, *clusters: Cluster) -> None:
        """Jobs that still run are ended; what is left of them is an error."""
        over: list[Cluster] = []
        problems: list[AssertionError] = []
        for cluster in clusters:
            try:
                (self._kept if cluster.settle() else over).append(cluster)
            except AssertionError as problem:
                problems.append(problem)
                over.append(cluster)
        over += self._kept[:-_KEPT_MAX]
        del self._kept[:-_KEPT_MAX]
        self._close(over, problems)

    def close(self) -> None:
        self._close(self._kept, [])

    @staticmethod
    def _close(clusters: list[Cluster], problems: list[AssertionError]) -> None:
        for cluster in clusters:
            try:
                cluster.close()
            except AssertionError as problem:
                problems.append(problem)
        assert not problems, problems


@pytest.fixture(scope="session")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    found = Clusters(lambda: tmp_path_factory.mktemp("cluster"))
    yield found
    found.close()


@pytest.fixture
def start(clusters: Clusters) -> Iterator[Callable[..., Cluster]]:
    """Start clusters, or take some that were left as good as new; what a test leaves is looked for."""
    used: list[Cluster] = []

    def begin(nodes: int = 3, slots: int = 2, **options: object) -> Cluster:
        used.append(clusters.take(nodes, slots, **options))
        return used[-1]

    yield begin
    clusters.give(*used)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Three hosts and a controller on a fourth; where they cannot be had, CI fails with the reason."""
    lacking = missing()
    if lacking and "CI" not in os.environ:
        pytest.skip(lacking)
    assert not lacking, lacking
    with standing(tmp_path) as found:
        yield found


@pytest.fixture(scope="session")
def undisturbed(clusters: Clusters) -> Callable[[str], dict[int, float]]:
    """The loss curve of a spec that nothing happens to, trained once for all tests."""
    curves: dict[str, dict[int, float]] = {}

    def curve(spec: str) -> dict[int, float]:
        if spec not in curves:
            cluster = clusters.take(nodes=2, slots=4 if "gpus_per_node: 4" in spec else 2)
            try:
                job = cluster.submit(spec)
                cluster.wait_state(job, "succeeded", within_s=900.0)
                curves[spec] = cluster.losses(job)
            finally:
                clusters.give(cluster)
        return curves[spec]

    return curve


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs with their recoveries, on machines that may be busy with something else."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
