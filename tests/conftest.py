"""What every test file may use."""

import os
from pathlib import Path

import pytest

# Read when huggingface_hub is first imported: no test may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data beside the checkout; a test that needs it is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder of shared data beside the checkout")
    return folder
