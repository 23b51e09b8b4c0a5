"""Shared fixtures. Real data is found through DFT_LORA_DATA (default ../shared/data)."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real benchmark files and tokenizers; absent: a skip for a person, an error in CI."""
    path = Path(os.environ.get("DFT_LORA_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        message = f"no real data at {path}: set DFT_LORA_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path
