"""The Space in a browser, as on a desktop and on a phone. playwright drives Debian's chromium."""

import shutil
import time

import numpy as np
import pytest
import space_server
from space_server import T, png


playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
space = space_server.space
# Every state of the gallery, however short it lasts.
RECORD = """() => {
    window.frames_seen = [];
    const gallery = [...document.querySelectorAll(".pictures")].find((one) => one.checkVisibility());
    new MutationObserver(() => {
        const frame = [...gallery.querySelectorAll("img")].map((one) => one.src);
        if (frame.length === 4) window.frames_seen.push(frame);
    }).observe(gallery.parentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["src"] });
}"""
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SCREENS)
def page(request, browser, space):
    """The page, opened; afterwards nothing was asked of another host and nothing was complained of."""
    context = browser.new_context(**SCREENS[request.param])
    page, strange = context.new_page(), []
    page.on(
        "request", lambda one: None if one.url.startswith((space.url, "data:", "blob:")) else strange.append(one.url)
    )
    page.on("console", lambda one: strange.append(one.text) if one.type == "error" else None)
    page.on("pageerror", lambda one: strange.append(str(one)))
    page.goto(space.url)
    page.get_by_role("button", name="Generate", exact=True).wait_for()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    assert strange == []
    context.close()


def go_to(page, name):
    page.get_by_role("tab", name=name).click()


# Presses Stop as soon as a step is shown: the drawing may be over before Python has asked for the status.
STOP_AT_ONCE = """() => {
    const shown = query => [...document.querySelectorAll(query)].filter(each => each.offsetParent);
    new MutationObserver((_, observer) => {
        if (!shown(".status").some(each => each.innerText.includes(": step"))) return;
        observer.disconnect();
        shown("button").find(each => each.innerText.trim() === "Stop").click();
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def status(page):
    return page.locator(".status:visible")


def pictures(page):
    return page.locator(".pictures img:visible").evaluate_all("all => all.map(one => one.src)")


def wait_for(condition, what):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.05)


def done(page):
    wait_for(lambda: status(page).inner_text().startswith("Done"), "it is not done in a minute")


def test_images_form_and_can_be_downloaded(page):
    assert status(page).get_attribute("aria-live") == "polite" and "Ready" in status(page).inner_text()
    page.locator("label:visible:has-text('DDPM')").click()
    steps = page.get_by_label("number input for Steps")
    wait_for(lambda: steps.input_value() == str(T), "DDPM does not take all steps")
    page.evaluate(RECORD)
    press(page, "Generate")
    done(page)
    forming = page.evaluate("window.frames_seen")
    assert len(forming) >= 2 and forming[0] != forming[-1] == pictures(page)
    assert len(set(pictures(page))) == 4
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as zip").click()
    assert download.value.suggested_filename == "images_seed_0.zip"


def test_stop_stops(page):
    page.locator("label:visible:has-text('DDPM')").click()
    page.get_by_label("number input for Images").fill("16")
    page.evaluate(STOP_AT_ONCE)
    press(page, "Generate")
    wait_for(lambda: status(page).inner_text() == "Stopped.", lambda: f"it says {status(page).inner_text()}")


def test_compare(page):
    go_to(page, "Compare")
    press(page, "Compare")
    done(page)
    assert len(pictures(page)) == 5
    assert "DDPM" in page.locator("figcaption:visible").last.inner_text()


def test_restore_an_upload_and_a_drawing(page, tmp_path):
    (tmp_path / "one.png").write_bytes(png(np.pad(np.full((12, 4), 255, np.uint8), ((4, 4), (8, 8)))))
    (tmp_path / "text.png").write_text("no image")
    go_to(page, "Restore")
    page.locator("label:visible:has-text('Upload')").click()
    page.locator("input[type=file]:not([disabled])").first.set_input_files(tmp_path / "one.png")
    page.locator("img:visible").first.wait_for()
    press(page, "Damage")
    wait_for(lambda: len(pictures(page)) == 2, "nothing is damaged")
    press(page, "Restore")
    done(page)
    uploaded = pictures(page)
    assert len(set(uploaded)) == 3

    page.locator("label:visible:has-text('Draw')").click()
    press(page, "Restore")  # nothing is drawn yet
    page.get_by_text("Nothing is drawn yet").wait_for()
    wait_for(lambda: status(page).inner_text() == "Stopped.", "the status says nothing of it")
    canvas = page.locator("canvas:visible")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 200, steps=4)
    page.mouse.up()
    press(page, "Restore")
    done(page)
    assert pictures(page)[0] != uploaded[0]


def test_the_slider_moves_through_the_forward_process(page):
    go_to(page, "How it works")
    wait_for(lambda: len(pictures(page)) == 3, "nothing is shown")
    slider, before = page.locator("input[type=range]:visible"), pictures(page)
    share = page.locator(".bar .signal:visible")
    wide = share.bounding_box()["width"]
    for _ in range(40):
        slider.press("ArrowRight")
    wait_for(
        lambda: pictures(page)[1] != before[1] and share.bounding_box()["width"] < wide, "the slider does nothing"
    )
    assert pictures(page)[0] == before[0]
