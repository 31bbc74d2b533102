"""Kernels run in Triton's interpreter, which has to be chosen before Triton is imported: ``make test-kernels``."""

import pytest

from pallas_kernels import is_interpreted


@pytest.fixture(autouse=True)
def _in_the_interpreter(request):
    if request.node.get_closest_marker("kernels") and not is_interpreted():
        pytest.fail("kernels need TRITON_INTERPRET=1 here: run make test-kernels")
