"""Kernels run in Triton's interpreter, which has to be chosen before Triton is imported: ``make test-kernels``."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if item.get_closest_marker("kernels"):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: run make test-kernels"))
