"""What holds for all tests."""

from __future__ import annotations

import pytest

import torchrecycle.cli.words


@pytest.fixture(autouse=True, scope="session")
def _commands_leave_the_allocator_of_the_tests_alone():
    """A command that runs within pytest would change it for all tests after, whose figures would be of another kind of
    machine; see `torchrecycle.allocator`, which is tested in processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchrecycle.cli.words, "keep_freed_memory", lambda: True)
        yield
