"""The pages in a browser: dark and light, wide and narrow, with and without scripts, by keyboard, and live."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
from browsers import NARROW, WIDE, hindrances, overflow, visiting
from commands import in_a_process
from exhibits import HEADER, Exhibits, arranged, colours
from playwright.sync_api import Browser, Page, expect
from playwright.sync_api import TimeoutError as PageTimeout

from batchserve import Client

pytestmark = pytest.mark.browser

PAGES = tuple(Exhibits.PATHS)
LONG = 200_000
"""Records of a job that takes some seconds where chunks are small."""
Start = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="module")
def site(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose jobs no test changes."""
    with start_server(tmp_path_factory.mktemp("site")) as url:
        yield url


@pytest.fixture(scope="module")
def exhibits(site: str, iris_onnx: Path, iris_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Exhibits:
    return arranged(site, tmp_path_factory.mktemp("exhibits"), iris_onnx, iris_csv)


@pytest.fixture(scope="module")
def live(start_server: Start, iris_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a model of flowers, for tests that make jobs."""
    with start_server(tmp_path_factory.mktemp("live")) as url, Client(url) as client:
        client.models.add(iris_onnx, name="iris")
        yield url


@pytest.fixture(scope="module")
def slow(start_server: Start, iris_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same with chunks so small that a job takes seconds."""
    with start_server(tmp_path_factory.mktemp("slow"), BATCHSERVE_CHUNK_BYTES="20000") as url, Client(url) as client:
        client.models.add(iris_onnx, name="iris")
        yield url


@pytest.fixture(scope="module")
def guarded(start_server: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a server with keys in force, and a key."""
    folder = tmp_path_factory.mktemp("guarded")
    with start_server(folder) as url:
        yield url, in_a_process(folder, "keys", "create", "ada").stdout.split()[-1]


# --- every page ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_hinders_nobody(browser: Browser, site: str, exhibits: Exhibits, name: str, dark: bool) -> None:
    path, status = exhibits.page(name)
    with visiting(browser, site + path, dark=dark, refused=[status]) as page:
        assert hindrances(page) == []
        assert overflow(page) == 0


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_narrow_screen(browser: Browser, site: str, exhibits: Exhibits, name: str) -> None:
    path, status = exhibits.page(name)
    with visiting(browser, site + path, size=NARROW, refused=[status]) as page:
        assert overflow(page) == 0
        assert hindrances(page) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_the_same_without_scripts(browser: Browser, site: str, exhibits: Exhibits, name: str) -> None:
    path, status = exhibits.page(name)
    with visiting(browser, site + path, refused=[status]) as page:
        heading = page.get_by_role("heading", level=1).inner_text()
    with visiting(browser, site + path, scripts=False, refused=[status]) as page:
        expect(page.get_by_role("heading", level=1)).to_have_text(heading)
        assert page.locator("main").inner_text().strip() != heading


def test_a_visit_notices_what_a_page_must_not_do(browser: Browser, site: str) -> None:
    with visiting(browser, site) as page:
        page.evaluate("document.querySelector('main').append(document.createElement('img'))")
        page.evaluate("document.querySelector('h1').textContent = 'w'.repeat(2000)")
        page.evaluate("document.querySelector('h1').setAttribute('class', 'number')")
        assert [fault for fault in hindrances(page) if fault.startswith("image-alt ")]
        assert overflow(page) > 0
    for script in ("console.error('no')", "setTimeout(() => { throw new Error('no') })", "fetch('http://192.0.2.1/')"):
        with pytest.raises(AssertionError, match=r"console|script"), visiting(browser, site) as page:
            page.evaluate(f"() => {{ {script}; return new Promise((resolve) => setTimeout(resolve, 200)); }}")


def test_a_page_is_dark_where_the_system_is(browser: Browser, site: str, exhibits: Exhibits) -> None:  # noqa: ARG001
    def ground(*, dark: bool) -> int:
        with visiting(browser, site, dark=dark) as page:
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))

    assert ground(dark=True) < 3 * 64 < 3 * 192 < ground(dark=False)


# --- the keyboard ----------------------------------------------------------------------------------------------------


def focused(page: Page) -> str:
    """The text, or the label, of what has the focus."""
    found = page.evaluate("""() => {
        const at = document.activeElement;
        return at.getAttribute("aria-label") || (at.labels && at.labels[0] && at.labels[0].innerText) || at.innerText;
    }""")
    return str(found).strip()


def test_the_first_key_leads_past_the_navigation(browser: Browser, site: str, exhibits: Exhibits) -> None:  # noqa: ARG001
    with visiting(browser, f"{site}/jobs") as page:
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("Tab")
        assert focused(page) == "Search"


def test_the_tabulator_goes_through_a_page_as_it_is_read(browser: Browser, site: str, exhibits: Exhibits) -> None:
    with visiting(browser, f"{site}/jobs?q=state:failed") as page:
        stops = []
        for _ in range(30):
            page.keyboard.press("Tab")
            stops.append(focused(page))
            if stops[-1].startswith("Delete"):
                break
        links = ["New job", "Jobs", "Schedules", "Models", "System", "API"]
        assert stops[:8] == ["Skip to the content", "batchserve", *links]
        assert stops[8:10] == ["Search", "Search"]
        assert stops[-6:] == [
            "Select unreadable.csv", "unreadable.csv", "iris@1", "Cancel", "Retry", "Delete…"
        ]  # fmt: skip
        assert exhibits.failed.id


def test_jobs_are_searched_by_keyboard(browser: Browser, site: str, exhibits: Exhibits) -> None:  # noqa: ARG001
    with visiting(browser, f"{site}/jobs") as page:
        page.get_by_label("Search", exact=True).focus()
        page.keyboard.type("state:failed")
        page.keyboard.press("Enter")
        expect(page).to_have_url(f"{site}/jobs?q=state%3Afailed")
        expect(page.get_by_role("row")).to_have_count(2)


# --- the list of jobs ------------------------------------------------------------------------------------------------


def test_a_list_shows_new_jobs_by_itself_and_keeps_what_is_selected(
    browser: Browser, live: str, iris_csv: Path, tmp_path: Path
) -> None:
    with Client(live) as client, visiting(browser, f"{live}/jobs") as page:
        client.upload(flowers(tmp_path, "first.csv", 1))
        box = page.get_by_label("Select first.csv")
        box.check()
        client.submit(iris_csv, "iris").wait(timeout=60)
        row = page.get_by_role("row").filter(has_text="iris.csv")
        expect(row.get_by_text("completed")).to_be_visible()
        expect(box).to_be_checked()
        assert page.evaluate("document.activeElement.id") == box.get_attribute("id")


def test_times_are_those_of_the_reader(browser: Browser, site: str, exhibits: Exhibits) -> None:
    path, _ = exhibits.page("jobs")
    with visiting(browser, site + path, scripts=False) as page:
        assert page.locator("td time").first.inner_text().endswith(" UTC")
    with visiting(browser, site + path) as page:
        expect(page.locator("td time").first).not_to_contain_text("UTC")


def test_selected_jobs_are_deleted_once_that_is_confirmed(browser: Browser, live: str, tmp_path: Path) -> None:
    with Client(live) as client:
        files = [flowers(tmp_path, name, 1) for name in ("unwanted.csv", "kept.csv")]
        unwanted, kept = map(client.upload, files)
        for scripts in (True, False):
            with visiting(browser, f"{live}/jobs?q=unwanted.csv", scripts=scripts) as page:
                page.get_by_label("Select unwanted.csv").check()
                page.get_by_role("button", name="Delete…").click()
                expect(page.get_by_role("heading", level=1)).to_have_text("Delete 1 job?")
                page.get_by_role("button", name="Delete", exact=True).click()
                expect(page.get_by_text("No job matches this search.")).to_be_visible()
            unwanted = client.upload(files[0])
        assert {unwanted.id, kept.id} <= {job.id for job in client.jobs.list(state="uploaded")}


# --- from a file to its predictions ----------------------------------------------------------------------------------


def flowers(folder: Path, name: str, records: int = 150) -> Path:
    """A table that no other test scores, so that no earlier result is its answer."""
    path = folder / name
    lines = (f"{5 + number / 1000:.3f},3.5,{hash_of(name)},0.2\n" for number in range(records))
    path.write_text(HEADER + "".join(lines))
    return path


def hash_of(name: str) -> int:
    return sum(name.encode())


def drop(page: Page, *files: Path) -> None:
    """Chooses files on the first page, and waits for the page of their job."""
    page.get_by_label("Drop a table, images").set_input_files(files)
    page.get_by_role("button", name="Upload").click()
    page.wait_for_url("**/jobs/*")


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_dropped_file_is_matched_started_and_scored(
    browser: Browser, live: str, tmp_path: Path, scripts: bool
) -> None:
    with visiting(browser, live, scripts=scripts) as page:
        drop(page, flowers(tmp_path, f"dropped-{scripts}.csv"))
        expect(page.get_by_role("heading", level=1)).to_have_text(f"dropped-{scripts}.csv")
        expect(page.get_by_label("Model to score it with")).to_have_value("iris@1")
        expect(page.get_by_role("status")).to_contain_text("The input fits iris@1.")
        expect(page.get_by_role("region", name="First predictions").get_by_role("row")).to_have_count(11)
        page.get_by_role("button", name="Start").click()
        until_state(page, "completed")


def test_a_file_is_dropped_anywhere_on_the_first_page(browser: Browser, live: str) -> None:
    with visiting(browser, live) as page:
        transfer = page.evaluate_handle(
            """(text) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([text], "thrown.csv", { type: "text/csv" }));
                return transfer;
            }""",
            HEADER + "5.1,3.5,1.4,0.2\n",
        )
        for kind in ("dragover", "drop"):
            page.dispatch_event("footer", kind, {"dataTransfer": transfer})
        page.wait_for_url("**/jobs/*")
        expect(page.get_by_role("heading", level=1)).to_have_text("thrown.csv")


def test_a_file_is_dropped_matched_and_started_by_keyboard(browser: Browser, live: str, tmp_path: Path) -> None:
    with visiting(browser, live) as page:
        tab_to(page, "Drop a table, images")
        with page.expect_file_chooser() as chosen:
            page.keyboard.press("Space")
        chosen.value.set_files(flowers(tmp_path, "typed.csv"))
        tab_to(page, "Upload")
        page.keyboard.press("Enter")
        page.wait_for_url("**/jobs/*")
        tab_to(page, "Start")
        page.keyboard.press("Enter")
        until_state(page, "completed")


def tab_to(page: Page, label: str) -> None:
    for _ in range(60):
        if focused(page).startswith(label):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{label!r} is not reached by the tabulator")


def until_state(page: Page, state: str) -> None:
    """Waits for the state of a job on its page, which shows it by itself where there are scripts."""
    found = page.locator("main .state").first
    deadline = time.monotonic() + 30
    while found.inner_text() != state and time.monotonic() < deadline:
        page.wait_for_timeout(200)
        if not page.evaluate("typeof htmx === 'object'"):
            page.reload()
    expect(found).to_have_text(state)


# --- a job -----------------------------------------------------------------------------------------------------------


def test_a_job_shows_its_bar_until_it_is_completed(browser: Browser, slow: str, tmp_path: Path) -> None:
    with Client(slow) as client, visiting(browser, slow) as page:
        job = client.submit(flowers(tmp_path, "long.csv", LONG), "iris")
        page.goto(f"{slow}/jobs/{job.id}")
        bar = page.get_by_label("Progress of long.csv")
        expect(bar).to_be_visible()
        seen = {float(bar.get_attribute("value") or 0)}
        while job.refresh().state == "running":
            with suppress(PageTimeout):
                seen.add(float(bar.get_attribute("value", timeout=200) or 0))
        until_state(page, "completed")
        assert len(seen) > 2
        expect(page.get_by_role("link", name="Result as csv")).to_be_visible()


def test_a_running_job_is_cancelled_and_retried(browser: Browser, slow: str, tmp_path: Path) -> None:
    with Client(slow) as client, visiting(browser, slow) as page:
        job = client.submit(flowers(tmp_path, "unwanted.csv", LONG), "iris")
        page.goto(f"{slow}/jobs/{job.id}")
        page.get_by_role("button", name="Cancel").click()
        until_state(page, "cancelled")
        page.get_by_role("button", name="Retry the unfinished rows").click()
        until_state(page, "completed")
        assert job.refresh().rows["ok"] == LONG


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_records_are_shown_side_by_side(browser: Browser, site: str, exhibits: Exhibits, scripts: bool) -> None:
    path, _ = exhibits.page("a job with failed rows")
    with visiting(browser, site + path, scripts=scripts) as page:
        if not scripts:
            page.get_by_role("link", name="Show the records").click()
        table = page.get_by_role("region", name="Table of records")
        expect(table.get_by_role("row")).to_have_count(22)
        page.get_by_label("Go to record").fill("40")
        page.keyboard.press("Enter")
        expect(table.get_by_role("row").nth(2)).to_contain_text("tall")


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_failed_records_are_grouped_and_scored_again(
    browser: Browser, site: str, exhibits: Exhibits, scripts: bool
) -> None:
    path, _ = exhibits.page("a job with failed rows")
    with visiting(browser, site + path, scripts=scripts) as page:
        if not scripts:
            page.get_by_role("link", name="Show why they failed").click()
        expect(page.get_by_role("heading", name="2 with wrong-type in sepal width (cm)")).to_be_visible()
        expect(page.get_by_role("heading", name="1 with missing-value in sepal width (cm)")).to_be_visible()
        page.goto(site + path)
        page.get_by_role("button", name="Score only these 3 again").click()
        page.wait_for_url(lambda url: not url.endswith(path))


def test_results_are_plotted(browser: Browser, site: str, exhibits: Exhibits) -> None:
    path, _ = exhibits.page("a job without failed rows")
    for dark in (False, True):
        with visiting(browser, site + path, dark=dark) as page:
            plots = page.get_by_role("img")
            expect(plots.first).to_be_visible()
            assert page.locator("#plots svg").count() >= 2
            assert hindrances(page) == []


def test_a_result_is_downloaded_in_another_format(browser: Browser, site: str, exhibits: Exhibits) -> None:
    path, _ = exhibits.page("a job without failed rows")
    with visiting(browser, site + path) as page:
        with page.expect_download() as begun:
            page.get_by_role("link", name="Result as csv").click()
        lines = begun.value.path().read_text().splitlines()
        assert len(lines) == 151
        assert "prediction" in lines[0]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_one_record_is_tried(browser: Browser, live: str, scripts: bool) -> None:
    with visiting(browser, f"{live}/models/iris/try", scripts=scripts, refused=[422]) as page:
        for name, value in zip(HEADER.strip().split(","), ("5.1", "3.5", "1.4", "0.2"), strict=True):
            page.get_by_label(name).fill(value)
        page.keyboard.press("Enter")
        expect(page.locator("#answer dd").first).to_have_text("setosa")
        page.get_by_label("petal width (cm)").fill("wide")
        page.get_by_role("button", name="Predict").click()
        expect(page.get_by_role("alert")).to_contain_text("wide")


WATCH_STEPS = """() => {
    new MutationObserver((changes) => {
        const now = changes.filter(({ target }) => target.hasAttribute("aria-current"));
        for (const { target } of now) sessionStorage.entered = `${sessionStorage.entered || ""} ${target.dataset.step}`;
    }).observe(document.querySelector("#admission"), { subtree: true, attributeFilter: ["aria-current"] });
}"""
"""Notes each step of an admission that the page enters, for the page that comes after it."""


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_model_is_registered_with_its_admission_or_the_reason_against_it(
    browser: Browser, live: str, tmp_path: Path, scripts: bool
) -> None:
    name, damaged = f"colours-{scripts}", tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no graph")
    with visiting(browser, f"{live}/models", scripts=scripts, refused=[422]) as page:
        page.get_by_label("Name").fill(name)
        page.get_by_label("ONNX file").set_input_files(damaged)
        page.get_by_role("button", name="Register").click()
        expect(page.get_by_role("alert")).to_be_visible()
        expect(page.locator("[aria-current=step], .done")).to_have_count(0)
        good = tmp_path / "colours.onnx"
        good.write_bytes(colours())
        page.evaluate(WATCH_STEPS)
        page.get_by_label("Name").fill(name)
        page.get_by_label("ONNX file").set_input_files(good)
        page.get_by_role("button", name="Register").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(f"{name}@1")
        expect(page.get_by_role("status")).to_contain_text("Version 1 is registered.")
        entered = (page.evaluate("sessionStorage.entered") or "").split()
        order = ["receive", "check", "run", "measure", "store"]
        assert entered == [step for step in order if step in entered]
        assert ("receive" in entered) == scripts


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_form_for_a_key_hinders_nobody(browser: Browser, guarded: tuple[str, str], dark: bool) -> None:
    url, _ = guarded
    for size in (WIDE, NARROW):
        with visiting(browser, url, dark=dark, size=size, refused=[401]) as page:
            page.get_by_label("API key").fill("bs_wrong")
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("not an API key")
            assert hindrances(page) == []
            assert overflow(page) == 0


def test_pages_follow_jobs_where_keys_are_in_force(browser: Browser, guarded: tuple[str, str], tmp_path: Path) -> None:
    url, key = guarded
    with Client(url, api_key=key) as client, visiting(browser, f"{url}/jobs") as page:
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("Jobs")
        client.upload(flowers(tmp_path, "followed.csv"))
        expect(page.get_by_role("link", name="followed.csv")).to_be_visible()


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_a_key_opens_the_pages_until_it_is_signed_out(
    browser: Browser, guarded: tuple[str, str], scripts: bool
) -> None:
    url, key = guarded
    with visiting(browser, f"{url}/jobs", scripts=scripts) as page:
        expect(page).to_have_url(f"{url}/sign-in?next=/jobs")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page).to_have_url(f"{url}/jobs")
        page.get_by_role("button", name="Sign out").click()
        page.goto(f"{url}/jobs")
        expect(page).to_have_url(f"{url}/sign-in?next=/jobs")
