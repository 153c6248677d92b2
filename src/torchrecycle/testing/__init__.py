"""Tests to inherit: what a store of your own must do. For test suites only; it needs pytest."""

import pytest

# Before the import, so that a failing `assert` in an inherited test shows its values.
pytest.register_assert_rewrite("torchrecycle.testing.store_contract")

from torchrecycle.testing.store_contract import StoreContract  # noqa: E402

__all__ = ["StoreContract"]
