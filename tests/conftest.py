"""Tests marked `slow` run only when asked for: SLM_SLOW=1 pytest."""
import os

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs only with SLM_SLOW=1")


def pytest_collection_modifyitems(items):
    if not os.environ.get("SLM_SLOW"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set SLM_SLOW=1"))
