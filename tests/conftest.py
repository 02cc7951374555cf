"""A safe environment for every test, before anything else is imported, and the fixtures of tests/kit."""

import pytest

pytest.register_assert_rewrite("tests.kit")

from tests.kit.environment import make_safe  # noqa: E402  its assertions are rewritten, too

make_safe()
pytest_plugins = [
    "tests.kit.scheduling",
    "tests.kit.costs",
    "tests.kit.retries",
    "tests.kit.skips",
    "tests.kit.fixtures",
]
