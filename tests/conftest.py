"""Where tests find real market data, and the environment every test starts from."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository."
    return ROOT


@pytest.fixture(scope="session")
def market_data() -> Path:
    "A folder of real bars: STRATFAM_DATA, else ../shared/data beside the repository; skips where there is none."
    folder = Path(os.environ.get("STRATFAM_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir(): pytest.skip(f"no market data at {folder}: set STRATFAM_DATA to a folder of bars")
    return folder
