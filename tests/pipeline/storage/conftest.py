"""What the tests of object storage share."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pipeline.storage import remote
from tests.kit.object_store import QUICK


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's temporary folder, for this test alone; and no long pauses between tries."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(remote.RETRIES, "backoff", QUICK)
    return folder
