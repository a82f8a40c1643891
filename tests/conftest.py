"""Options and fixtures of all tiers."""

import hypothesis
import pytest

# Deadlines of single examples say more of the machine than of the code.
hypothesis.settings.register_profile("keepstep", deadline=None, print_blob=True)
hypothesis.settings.load_profile("keepstep")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-rewrite", action="store_true", help="write the expected sides of golden scripts anew"
    )


@pytest.fixture
def golden_rewrite(request: pytest.FixtureRequest) -> bool:
    """Whether to write what comes out instead of comparing it; a person reads the difference."""
    return bool(request.config.getoption("--golden-rewrite"))
