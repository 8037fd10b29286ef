"""A host whose training is a stub."""

import pytest
from sshd import laptop, stub_train  # noqa: F401


@pytest.fixture
def host(laptop):  # noqa: F811
    stub_train(laptop)
    return laptop
