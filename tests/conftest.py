# SPDX-License-Identifier: MIT
"""What the tests of all scripts share."""

import pytest


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """Where the toy corpus is written and decoded, by the first test that needs it; only read after that."""
    return tmp_path_factory.mktemp("toy")
