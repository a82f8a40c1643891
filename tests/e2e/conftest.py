"""Clusters for tests that act as a user would: real controllers and agents, ranks really killed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import Cluster


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Start clusters; each is ended and looked over for leftovers after the test."""
    clusters: list[Cluster] = []

    def begin(nodes: int = 3, slots: int = 2, **options: object) -> Cluster:
        cluster = Cluster(tmp_path / f"home{len(clusters)}", nodes=nodes, slots=slots, **options)
        clusters.append(cluster)
        return cluster

    yield begin
    problems = []
    for cluster in clusters:
        try:
            cluster.close()
        except AssertionError as problem:
            problems.append(problem)
    assert not problems, problems


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[int, float]]:
    """The loss curve of a spec that nothing happens to, trained once for all tests."""
    curves: dict[str, dict[int, float]] = {}

    def curve(spec: str) -> dict[int, float]:
        if spec not in curves:
            slots = 4 if "gpus_per_node: 4" in spec else 2
            cluster = Cluster(tmp_path_factory.mktemp("undisturbed") / "home", nodes=2, slots=slots)
            try:
                job = cluster.submit(spec)
                cluster.wait_state(job, "succeeded", within_s=900.0)
                curves[spec] = cluster.losses(job)
            finally:
                cluster.close()
        return curves[spec]

    return curve


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole jobs with their recoveries, on machines that may be busy with something else."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))
