"""What `conftest` says of test files is true of those that are there."""

from pathlib import Path

import pytest


def test_the_files_that_share_something_exist(pytestconfig: pytest.Config) -> None:
    root = Path(__file__).parents[1]
    conftest = pytestconfig.pluginmanager.get_plugin(str(root / "tests" / "conftest.py"))
    assert [name for name in conftest.SHARED if not (root / name).is_file()] == []
