"""A headless Chromium for the tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

FOLDER = Path(__file__).parents[1] / ".browser"


def executable() -> str | None:
    """Return the Chromium that ``$CHROMIUM``, ``.browser`` or the search path names; None if there is none."""
    names = (os.environ.get("CHROMIUM"), FOLDER / "chromium", "chromium", "google-chrome")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Start the browser, without a network."""
    from playwright.sync_api import sync_playwright

    libraries = {"LD_LIBRARY_PATH": str(FOLDER / "al2023/lib")} if (FOLDER / "al2023").exists() else {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable(), args=["--no-sandbox"], env=os.environ | libraries
        )
        yield browser
        browser.close()
