"""Which versions of PEFT and transformers this package runs with, checked when it is imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

# As in pyproject.toml, which pip reads; a test holds the two together. Here a second time, since the metadata of an
# installation may be absent (a checkout on the path) or older than the code (an editable installation).
SUPPORTED = {"peft": ">=0.21,<0.22", "transformers": ">=5.18,<5.23"}


def check_version(library: str, found: str | None) -> None:
    """Refuses a version with which this package was not tested.

    Raises:
        ImportError: the version is outside ``SUPPORTED``, or there is none (``found=None``).
    """
    supported = SUPPORTED[library]
    if found is None or not SpecifierSet(supported).contains(found, prereleases=True):
        raise ImportError(
            f"moslora_core works with {library} {supported} and found {found or 'none'}: it relies on internals that "
            f"other versions may have changed. Install one of these: pip install '{library}{supported}'"
        )


def check_versions() -> None:
    """Refuses what is installed, as :func:`check_version` does, without importing it."""
    for library in SUPPORTED:
        try:
            found = version(library)
        except PackageNotFoundError:
            found = None
        check_version(library, found)
