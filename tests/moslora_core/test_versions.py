"""Versions of PEFT and transformers outside the range that was tested are refused when the package is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moslora_core import versions

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def supported(monkeypatch):
    monkeypatch.setattr(versions, "SUPPORTED", {"peft": ">=0.21,<0.22"})


@pytest.mark.parametrize("found", ["0.21.0", "0.21.2", "0.21.19", "0.21.3.dev0", "0.21.1rc1", "0.21.2+local"])
def test_versions_within_the_range_pass(found):
    versions.check_version("peft", found)


@pytest.mark.parametrize("found", ["0.2.1", "0.20.9", "0.21.0rc1", "0.22.0", "0.22.0.dev0", "1.0.0"])
def test_other_versions_are_refused(found):
    with pytest.raises(ImportError) as caught:
        versions.check_version("peft", found)
    message = str(caught.value)
    assert "\n" not in message
    assert f"works with peft >=0.21,<0.22 and found {found}:" in message
    assert message.endswith("pip install 'peft>=0.21,<0.22'")


def test_a_missing_library_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "SUPPORTED", {"no-such-library": ">=1"})
    with pytest.raises(ImportError, match=r"works with no-such-library >=1 and found none: .*'no-such-library>=1'$"):
        versions.check_versions()


@pytest.mark.parametrize("library, found", [("peft", "0.20.0"), ("transformers", "4.57.6")])
def test_the_import_refuses_before_it_imports_the_library(library, found, tmp_path):
    """Old versions of one fail on new ones of the other with an error that names neither."""
    metadata = tmp_path / f"{library}-{found}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {found}\n")
    code = f"import sys\ntry: import moslora_core\nexcept ImportError as e: print(e, {library!r} in sys.modules)"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"works with {library} " in done.stdout and f" and found {found}: " in done.stdout
    assert done.stdout.endswith("False\n")
