"""The page as people use it, in a browser without any other network: they type, click, see images, and keep them."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image, ImageSequence

from deco_jax.cli import main
from deco_jax.demo.page import listen, make_application
from deco_jax.demo.studio import Studio, open_studio, read_settings

pytest.importorskip("gradio")
pytest.importorskip("tokenizers")
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["class", "text"])
def served(request, runs, tmp_path_factory):
    """(kind, address, process) of `deco demo`, whose temporary files lie in process.folder."""
    yield from _serve(runs[request.param], request.param, tmp_path_factory.mktemp("temporary"))


def _serve(run, kind, folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "deco_jax", "demo", run, "--port=0", "--max-images=2", "--max-side=64"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.folder = folder
    line = process.stdout.readline()
    found = re.fullmatch(rf"{kind}/checkpoints/1: (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
    if found is None:
        process.kill()
        raise AssertionError(line + process.stderr.read())
    yield kind, found[1], process
    process.kill()
    process.communicate()


@pytest.fixture
def page(served):
    """The page in Chromium; fails if it asks another host for anything, or complains."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    _, address, process = served
    complaints = []
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", ALONE]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: _is_ours(request.url, address) or complaints.append(request.url))
        page.goto(address)
        yield page
        browser.close()
    assert not complaints
    assert process.poll() is None, "the server is gone"


def _is_ours(url, address):
    return url.startswith((address, "data:", "blob:"))


def fill(page, **values):
    for name, value in values.items():
        page.get_by_label(name, exact=True).fill(value)


def draw(page):
    page.get_by_role("button", name="Draw", exact=True).click()


def pictures(page):
    """Width and height of the gallery's images, once they are there."""
    page.get_by_text(re.compile(r"\d images? in")).wait_for()
    page.wait_for_function("[...document.querySelectorAll('.grid-wrap img')].some((i) => i.naturalWidth)")
    sizes = "(i) => [i.naturalWidth, i.naturalHeight]"
    return page.evaluate(f"[...document.querySelectorAll('.grid-wrap img')].map({sizes})")


def test_images_are_drawn_seen_and_kept(served, page, tmp_path):
    kind, *_ = served
    if kind == "text":
        fill(page, Prompt="a red circle", **{"Negative prompt": "a blue circle"})
        expected, side = {"labels": ["a red circle"], "negative": "a blue circle", "solver": "adams2"}, 16
    else:
        fill(page, Class="4")
        page.get_by_role("option", name="4", exact=True).click()
        expected, side = {"labels": [4], "negative": None, "solver": "euler", "guidance_interval": [0.1, 1.0]}, 14
    page.get_by_text("Sampler").click()
    fill(page, Images="2", Seed="11", Height=str(2 * side), Width=str(side), Steps="4", Guidance="3.5")
    page.get_by_label("Show how the images come about").check()
    draw(page)
    assert pictures(page) == [[side, 2 * side]] * 2
    link = page.locator("a[download*='seed11-1.png']")
    with page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "kept.png")
    told = read_settings(tmp_path / "kept.png")
    assert told["source"] == f"{kind}/checkpoints/1" and (told["seed"], told["number"]) == (11, 1)
    assert told | expected == told and told["image_size"] == [2 * side, side]
    assert (told["steps"], told["guidance"], told["shift"]) == (4, 3.5, 3.0)
    film = page.locator(".film img").get_attribute("src")
    with urllib.request.urlopen(film) as answer, Image.open(answer) as frames:
        assert len(list(ImageSequence.Iterator(frames))) == 5 and frames.format == "GIF"
    in_gallery = page.locator(".grid-wrap img").first.get_attribute("src")
    with urllib.request.urlopen(in_gallery) as answer, Image.open(answer) as image:
        assert "sample.json" in image.text, "what the gallery's own button downloads says it as well"
        assert np.asarray(image).std() > 5


def test_what_is_wrong_is_said_on_the_page(served, page):
    kind, *_ = served
    field, right, wrong, told = {
        "class": ("Class", "3", "elephant", "no class is called 'elephant'; write its number"),
        "text": ("Prompt", "a <b>red</b> circle", " ", "The prompt is empty"),
    }[kind]
    page.get_by_text("Sampler").click()
    for name, value, message in (
        (field, wrong, told),
        ("Seed", "-1", "seed=-1 must be a whole number from 0 to 4294967295"),
        ("Width", "65", "width=65 must be a whole number from 1 to 64"),
        ("Height", "20", "must be a positive multiple of the network's patch size"),
        ("Images", "3", "images=3 must be a whole number from 1 to 2"),
        ("Steps", "", "steps= must be a number"),
        ("Shift", "0", "shift=0 must be positive"),
    ):
        before = page.get_by_label(name, exact=True).input_value()
        fill(page, **{name: value})
        draw(page)
        page.get_by_text(message).wait_for()
        fill(page, **{name: right if name == field else before})
    draw(page)
    assert len(pictures(page)) == 1, "the page goes on"


def test_a_seed_is_thrown(page):
    page.get_by_role("button", name="Random seed").click()
    page.wait_for_function("[...document.querySelectorAll('input[type=number]')].some((i) => i.value > 1000)")


def test_no_file_is_served_that_the_page_did_not_make(served):
    _, address, process = served
    for path in (ROOT / "README.md", "/etc/passwd", process.folder):
        for route in ("file=", "gradio_api/file="):
            with pytest.raises(urllib.error.HTTPError, match="40[34]"):
                urllib.request.urlopen(f"{address}/{route}{path}")
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
    post = urllib.request.Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError, match="4"):
        urllib.request.urlopen(post)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(runs, tmp_path, how):
    for _, address, process in _serve(runs["class"], "class", tmp_path):
        assert urllib.request.urlopen(address).status == 200
        process.send_signal(how)
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in complaints, complaints
        assert not list(tmp_path.glob("*/*.png")) and not list(tmp_path.glob("deco_demo_*"))


@pytest.fixture
def slow(runs, tmp_path):
    """(address, done) of a page whose drawings last a minute; done is a list of the seeds, one entry for each step."""
    uvicorn = pytest.importorskip("uvicorn")
    done, studio = [], open_studio(runs["class"])

    class Slow(Studio):
        def draw(self, wish):
            for k in range(1, 1201):
                done.append(wish.seed)
                time.sleep(0.05)
                yield k

    studio = Slow(*(getattr(studio, field.name) for field in dataclasses.fields(studio)))
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(make_application(studio, 1, tmp_path), log_level="error"))
        thread = threading.Thread(target=server.run, args=[[listening]], daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", done
        server.should_exit = server.force_exit = True
        thread.join(20)


def test_one_draws_few_wait_and_who_leaves_frees_the_place(slow):
    """By what a browser sends, as three people at once."""
    address, done = slow

    def ask(seed):
        events = json.load(urllib.request.urlopen(f"{address}/config"))["dependencies"]
        (draw,) = [event["id"] for event in events if event["inputs"]]
        fields = ["3", "", 1, seed, 14, 14, False, 4, 2.5, 0, 1, "euler", 1]
        body = json.dumps({"data": fields, "fn_index": draw, "session_hash": f"s{seed}"}).encode()
        post = urllib.request.Request(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
        json.load(urllib.request.urlopen(post))
        return urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=s{seed}")

    def wait(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, done
            time.sleep(0.05)

    first = ask(1)
    wait(lambda: done)
    second = ask(2)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        ask(3)
    assert set(done) == {1}, "one at a time"
    first.close()
    wait(lambda: 2 in done)
    before = done.count(1)
    wait(lambda: done.count(2) > 20)
    assert done.count(1) == before, "nobody waits for it any more"
    second.close()


def test_an_address_that_cannot_be_had(served, runs, capsys):
    _, address, _ = served
    taken = address.rpartition(":")[2]
    for flags, message in (
        ([f"--port={taken}"], f"--host=127.0.0.1 --port={taken} cannot be served"),
        (["--port=70000"], "--port=70000 must be from 0 to 65535"),
        (["--host=no.such.host.invalid"], "--host=no.such.host.invalid --port=7860 cannot be served"),
        (["--queue=0"], "--queue=0 must be at least 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["demo", runs["class"], *flags])
        assert message in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(monkeypatch, runs, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", runs["class"]])
    assert "The page needs gradio: pip install -e '.[demo]' in the repo" in capsys.readouterr().err
