"""The Space in a browser, as on a light desktop and on a dark phone. playwright drives Debian's chromium."""

import re
import shutil
import time

import httpx
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
        if (frame.length === 8) window.frames_seen.push(frame);
    }).observe(gallery.parentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["src"] });
}"""
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"},
}


# The faults of all that is visible, by WCAG 2.2 AA: 1.4.3, contrast, and 4.1.2, names.
FAULTS = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true }), known = {};
    const rgba = (color) => known[color] ??= (() => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    })();
    const over = (top, below) => [0, 1, 2].map((k) => (top[k] * top[3] + below[k] * (255 - top[3])) / 255);
    const behind = (element) => {
        const layers = [];
        for (let one = element; one; one = one.parentElement) layers.push(rgba(getComputedStyle(one).backgroundColor));
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
    };
    const luminance = (color) => color.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92
        : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
    const isShown = (one) => one.checkVisibility({ opacityProperty: true, visibilityProperty: true })
        && one.getBoundingClientRect().width > 1;
    const faults = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
        if (!text || !isShown(element) || element.closest("script, style, :disabled")) continue;
        const style = getComputedStyle(element), below = behind(element), own = over(rgba(style.color), below);
        const [low, high] = [luminance(own), luminance(below)].sort((a, b) => a - b);
        const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < (isLarge ? 3 : 4.5)) faults.add(`${text.slice(0, 30)}: contrast ${ratio.toFixed(2)}`);
    }
    for (const one of document.querySelectorAll("button, a[href], input, select, textarea, canvas, img")) {
        const labels = [...(one.labels ?? [])].map((each) => each.innerText).join("");
        const name = one.ariaLabel || one.title || one.alt || one.innerText || labels || one.placeholder
            || one.getAttribute("aria-labelledby") || one.closest("a")?.title;
        if (isShown(one) && !name?.trim()) faults.add(`no name: ${one.outerHTML.slice(0, 90)}`);
    }
    return [...faults];
}"""
HAS_RING = """() => {
    const style = getComputedStyle(document.activeElement);
    return style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SCREENS)
def page(request, browser, space):
    """The page, opened; afterwards nothing was asked of another host and nothing was complained of."""
    context = browser.new_context(**SCREENS[request.param], reduced_motion="reduce")
    context.set_default_timeout(60_000)
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
    assert strange == [] and not page.locator(".toast-body").count()
    assert page.evaluate(FAULTS) == []
    assert page.evaluate("document.body.classList.contains('dark')") == (request.param == "phone")
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
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.05)


def done(page):
    wait_for(lambda: status(page).inner_text().startswith("Done"), "it is not done in a minute")


def is_stale(page):
    return page.locator(".results[data-stale]:visible").count() == 1


def go_by_keyboard(page, name):
    """Press Tab until the button has the focus. Each control on the way shows that it has it."""
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.innerText ?? ''")
        assert page.evaluate(HAS_RING), focused or page.evaluate("document.activeElement.outerHTML")
        if focused.strip() == name:
            return
    raise AssertionError(f"{name} is not reached")


def test_images_form_and_can_be_downloaded(page):
    assert status(page).get_attribute("aria-live") == "polite" and "Ready" in status(page).inner_text()
    first = pictures(page)
    assert len(set(first)) == 8 and not is_stale(page)  # there is something to see
    seed = page.get_by_label("Seed").first
    assert seed.input_value() == "0"
    press(page, "Generate")  # what is shown is drawn already, so this takes the next seeds
    done(page)
    assert seed.input_value() == "8" and not set(pictures(page)) & set(first) and "seed 8" in status(page).inner_text()
    page.locator("label:visible:has-text('DDPM')").click()
    steps = page.get_by_label("number input for Steps")
    wait_for(lambda: int(steps.input_value()) > 50, "DDPM does not take many steps")
    assert is_stale(page) and "have changed: press Generate" in status(page).inner_text()
    steps.fill("100")
    page.evaluate(RECORD)
    go_by_keyboard(page, "Generate")
    page.keyboard.press("Enter")
    done(page)
    assert not is_stale(page)
    assert page.locator(".results:visible").evaluate("one => one.getBoundingClientRect().top < innerHeight / 2")
    forming = page.evaluate("window.frames_seen")
    assert len(forming) >= 2 and forming[0] != forming[-1] == pictures(page)
    assert len(set(pictures(page))) == 8 and not set(pictures(page)) & set(first)
    for name, suffix in (("Download as zip", "zip"), ("Sheet as PNG", "png"), ("Formation as GIF", "gif")):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        assert download.value.suggested_filename == f"images_seed_8.{suffix}"
    steps.fill("2")
    for typed, shown in (("", "8"), ("", "16"), ("5", "5"), ("", "5")):  # a typed seed stays
        if typed:
            seed.fill(typed)
        before = pictures(page)
        press(page, "Generate")
        page.wait_for_timeout(300)  # the status may say of the last press that it is done
        done(page)
        assert f"2 steps, seed {shown}," in status(page).inner_text()
        assert seed.input_value() == shown and not is_stale(page)
        assert (pictures(page) != before) == bool(typed or shown != "5")


def test_the_sliders_end_where_a_request_would_be_refused_and_a_link_restores_all_settings(page, space):
    steps, images = (page.get_by_label(f"number input for {name}") for name in ("Steps", "Images"))
    page.locator("label:visible:has-text('DDPM')").click()
    images.fill("16")
    images.press("Enter")
    slider = page.get_by_label("range slider for Steps")
    scripts = " ".join(str(one["js"]) for one in httpx.get(f"{space.url}/config").json()["dependencies"])
    most = int(re.search(r'"most": (\d+)', scripts)[1])
    wait_for(lambda: slider.get_attribute("max") == str(min(T, most // 16)), "the slider does not end there")
    if most // 16 < T:
        assert page.get_by_text(f"at most {most // 16} for 16 images: a request may take").is_visible()
    press(page, "Another")
    seed = page.get_by_label("Seed").first
    wait_for(lambda: seed.input_value() != "0", "the seed stays")
    press(page, "Link to these settings")
    link = page.locator(".status:visible a")
    link.wait_for()
    wanted = [one.input_value() for one in (steps, images, seed)]
    page.goto(link.get_attribute("href"))
    wait_for(lambda: [one.input_value() for one in (steps, images, seed)] == wanted, "the settings are not restored")
    assert page.locator("label:visible:has-text('DDPM') input").is_checked()
    page.goto(f"{space.url}?tab=restore&damage=Blur&strength=None&seed=-5")
    damage = page.locator("label:visible:has-text('Blur') input")
    wait_for(lambda: damage.count() == 1 and damage.is_checked(), "the link's tab is not open")
    assert page.locator("label:visible:has-text('Medium') input").is_checked()  # there is no strength None


def test_stop_stops(page):
    page.locator("label:visible:has-text('DDPM')").click()
    page.evaluate(STOP_AT_ONCE)
    press(page, "Generate")
    wait_for(lambda: status(page).inner_text() == "Stopped.", lambda: f"it says {status(page).inner_text()}")


def test_compare(page):
    go_to(page, "Compare")
    press(page, "Compare")
    done(page)
    assert len(pictures(page)) == 5
    assert "DDPM" in page.locator("figcaption:visible").last.inner_text()
    sides = page.locator(".pair img:visible")
    assert [one.get_attribute("src") for one in sides.all()] == [pictures(page)[0], pictures(page)[-1]]
    page.get_by_label("Left picture").press("ArrowRight")
    assert sides.first.get_attribute("src") == pictures(page)[1]
    assert "10 steps" in page.locator(".left-caption").inner_text()


def test_restore_an_upload_and_a_drawing(page, tmp_path):
    (tmp_path / "one.png").write_bytes(png(np.pad(np.full((12, 4), 255, np.uint8), ((4, 4), (8, 8)))))
    (tmp_path / "text.png").write_text("no image")
    go_to(page, "Restore")
    assert len(pictures(page)) == 2
    page.locator("label:visible:has-text('Upload')").click()
    wait_for(lambda: "No image is uploaded yet" in status(page).inner_text(), "the status does not say it")
    page.locator("input[type=file]:not([disabled])").first.set_input_files(tmp_path / "one.png")
    page.locator("img:visible").first.wait_for()
    wait_for(lambda: len(pictures(page)) == 2, "nothing is damaged")
    press(page, "Restore")
    done(page)
    uploaded = pictures(page)
    assert len(set(uploaded)) == 3

    page.locator("label:visible:has-text('Draw')").click()
    wait_for(lambda: "Nothing is drawn yet" in status(page).inner_text(), "the status does not say it")
    press(page, "Restore")
    wait_for(lambda: "Nothing is drawn yet" in status(page).inner_text(), "the status does not say it")
    canvas = page.locator("canvas:visible")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 200, steps=4)
    page.mouse.up()
    wait_for(lambda: len(pictures(page)) == 2, "the drawing is not damaged")
    press(page, "Restore")
    done(page)
    assert pictures(page)[0] != uploaded[0]


def test_the_slider_moves_through_the_forward_process(page):
    go_to(page, "How it works")
    wait_for(lambda: len(pictures(page)) == 3, "nothing is shown")
    slider, before = page.get_by_label("range slider for Timestep t"), pictures(page)
    share = page.locator(".bar .signal:visible")
    wide = share.bounding_box()["width"]
    for _ in range(40):
        slider.press("ArrowRight")
    wait_for(
        lambda: pictures(page)[1] != before[1] and share.bounding_box()["width"] < wide, "the slider does nothing"
    )
    assert pictures(page)[0] == before[0]
