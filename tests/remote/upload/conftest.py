"""A sender to a real sshd."""

import pytest
from sender import Sender
from sshd import laptop  # noqa: F401


@pytest.fixture
def sender(laptop):  # noqa: F811
    return Sender(laptop)
