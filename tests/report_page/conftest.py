"""A real browser for the report's tests."""

import shutil

import pytest

from tests.report_page.pages import Visit


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the report's pages are not opened: no Playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"the report's pages are not opened: found none of {', '.join(names)}")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens pages; they are closed with the test."""
    visits = []

    def open_page(path, **context_options):
        visits.append(Visit(browser, path, **context_options))
        return visits[-1]

    yield open_page
    for visit in visits:
        visit.context.close()
