"""Does the page look as it should in a browser, with no network, and is nothing overwritten by it?"""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from deco_jax.cli import main
from deco_jax.errors import UsageError
from deco_jax.reports.report import write_report
from tests.reports.workdirs import add_results, make_workdir, png

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=8000",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", 
]  # fmt: skip
# Waits until all figures are drawn, acts as a reader does, and writes what that reader sees into the page.
PROBE = """<script>
const rest = () => new Promise((done) => setTimeout(done, 300));
const shown = () => [...document.querySelectorAll(".grids img")].filter((i) => !i.hidden).map((i) => {
  const canvas = document.createElement("canvas"), paint = canvas.getContext("2d");
  paint.drawImage(i, 0, 0, 1, 1, 0, 0, 1, 1);
  return [Number(i.dataset.step), paint.getImageData(0, 0, 1, 1).data[0]];
});
window.addEventListener("load", async () => {
  const seen = {};
  await rest(); await rest();
  %s
  document.body.insertAdjacentHTML("beforeend", "<pre id=probe></pre>");
  document.getElementById("probe").textContent = JSON.stringify(seen);
});
</script></body>"""
LOOK = """
  const plots = [...document.querySelectorAll(".plot > div")];
  seen.plots = plots.length;
  seen.drawn = plots.filter((p) => p.querySelector("path.js-line, .bars path, .points path")).length;
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  seen.images = shown();
"""


@pytest.fixture
def look(tmp_path):
    """look(page, script, fragment, width): what the script finds in Chromium; fails if the page complains."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")

    def look(page, script=LOOK, fragment="", width=1300):
        text = page.read_text()
        head, _, tail = text.rpartition("</body>")
        copy = tmp_path / "probed.html"
        copy.write_text(head + PROBE % script + tail)
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [CHROMIUM, *FLAGS, profile, f"--window-size={width},1000", "--dump-dom", f"{copy.as_uri()}{fragment}"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        dom = ran.stdout
        console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line and "auto-margin" not in line]
        assert not console, console
        problems = re.search(r'<div id="problems".*?</div>', dom, re.DOTALL)[0]
        assert "could not be shown" not in problems, problems
        return json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom)[1]))

    return look


def test_two_runs_with_everything_side_by_side(tmp_path, look):
    first = add_results(make_workdir(tmp_path / "a", grids=(20, 60, 100)))
    second = make_workdir(tmp_path / "b", grids=(30, 90), shade=100, optimizer__lr=0.5)
    page = write_report([str(first), str(second)], str(tmp_path / "page.html"))
    script = (
        LOOK
        + """
      const slider = document.getElementById("step"), at = document.getElementById("shown-step");
      const set = (value) => { slider.value = value; slider.dispatchEvent(new Event("input")); };
      seen.steps = JSON.parse(slider.dataset.steps);
      set(0); seen.first = [shown(), location.hash];
      set(3); seen.fourth = shown();
      location.hash = "#step=61"; await rest(); seen.linked = [shown(), slider.value, at.textContent];
      const lines = () => document.querySelectorAll(".plot path.js-line").length, before = lines();
      document.querySelector("[data-run='1']").click(); await rest(); seen.fewer = lines() < before;
      document.getElementById("logarithmic").click(); await rest();
      seen.types = plots.map((p) => p._fullLayout.yaxis.type).filter((t) => t === "log").length;
      seen.star = [...document.querySelectorAll(".plot .points path")].some((p) => p.style.fill === "rgb(230, 159, 0)");
    """
    )
    seen = look(page, script)
    # 5 of losses and the like, 1 evaluation in training, 1 sweep, 2 spectra, 1 goodput, 2 of speed
    assert seen["plots"] == seen["drawn"] == 12
    assert seen["steps"] == [20, 30, 60, 90, 100] and seen["images"] == [[100, 100], [90, 190]]
    assert seen["first"] == [[[20, 20], [30, 130]], "#step=20"], "each run shows its nearest step"
    assert seen["fourth"] == [[100, 100], [90, 190]]
    assert seen["linked"] == [[[60, 60], [90, 190]], "2", "step 60"]
    assert seen["fewer"] and seen["types"] == 4 and seen["star"] and not seen["wide"]
    text = page.read_text()
    for part in (
        "12.5",
        "1,000 images are few.",
        "TPU v6e",
        "★ best fid",
        "to compare",
        "Fields in which the runs differ",
    ):
        assert part in text
    assert "evaluation/metrics.json" in text and "guidance=2.0" not in text, "points of a sweep stand in its own table"


@pytest.mark.slow
def test_a_link_opens_the_step_it_names_also_on_a_narrow_screen(tmp_path, look):
    page = write_report([str(make_workdir(tmp_path / "run"))])
    seen = look(page, fragment="#step=58", width=500)
    assert seen["images"] == [[60, 60]] and not seen["wide"]


def test_names_and_settings_are_text_and_no_markup(tmp_path, look):
    attack = "<script>problem('attack')</script><img src=x onerror=problem(1)>"
    workdir = make_workdir(
        tmp_path / "<b>&amp;'\"", data__path=attack, train__init_from="</script><script>problem(2)//"
    )
    add_results(workdir)
    for file in ("evaluation/metrics.json", "sweep/sweep.json", "spectra/spectra.json"):
        content = (workdir / file).read_text()
        for word in ("to compare", "fid", "ours", "ref.npz", "guidance"):
            content = content.replace(f'"{word}"', json.dumps(word + attack))
        (workdir / file).write_text(content)
    other = make_workdir(tmp_path / "other")
    page = write_report([str(workdir), str(other)], str(tmp_path / "page.html"))
    assert "problem(&#39;attack&#39;)" in page.read_text()
    seen = look(
        page, LOOK + "seen.scripts = document.scripts.length; seen.names = document.querySelector('h1').textContent;"
    )
    assert seen["scripts"] == page.read_text().count("<script>") + 1 and seen["plots"] == seen["drawn"]
    assert seen["names"] == "<b>&amp;'\" · other"


def test_nothing_is_loaded_from_anywhere(tmp_path):
    """In a browser the page's own policy forbids it; here is that nothing tries, outside of plotly's code."""
    page = write_report([str(add_results(make_workdir(tmp_path / "run")))]).read_text()
    assert "default-src 'none'" in page
    outside = "".join(part for part in re.split(r"(<script>.*?</script>)", page, flags=re.DOTALL) if len(part) < 1e6)
    assert not re.findall(
        r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+|@import|url\(|<link|<iframe", re.sub(r"base64,[^\"]+", "", outside)
    )
    assert page.count("plotly.js v") == 1, "the library is in the page once"
    assert len(page) < 6e6


def test_many_and_large_grids_keep_the_page_small(tmp_path):
    workdir = make_workdir(tmp_path / "run", steps=1000, every=100, grids=range(10, 1001, 10))
    noise = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), np.uint8)
    (workdir / "samples/step_00001000.png").write_bytes(png(noise))
    text = write_report([str(workdir)]).read_text()
    steps = [int(step) for step in re.findall(r'<img [^>]*data-step="(\d+)"', text)]
    assert len(steps) == 30 and steps[0] == 10 and steps[-1] == 1000 and max(np.diff(steps)) <= 40
    assert "30 of 100 sample grids are shown" in text
    assert text.count("data:image/jpeg") == 1 and len(text) < 7e6, "6.7 MB of noise is carried as a smaller JPEG"


def test_only_a_report_is_replaced(tmp_path, capsys):
    workdir = make_workdir(tmp_path / "run")
    target = write_report([str(workdir)])
    assert target == workdir / "report.html" and str(target) in capsys.readouterr().out
    before = target.read_bytes()
    assert write_report([str(workdir)]) == target
    mine = tmp_path / "mine.html"
    mine.write_text("<p>deco report</p>")
    with pytest.raises(UsageError, match="no report of this command; remove it"):
        write_report([str(workdir)], str(mine))
    assert mine.read_text() == "<p>deco report</p>"
    with pytest.raises(UsageError, match="is a folder"):
        write_report([str(workdir)], str(tmp_path))
    with pytest.raises(UsageError):
        write_report([str(tmp_path / "absent")], str(target))
    assert target.read_bytes()[:300] == before[:300] and len(target.read_bytes()) == len(before)


def test_the_command(tmp_path, capsys):
    make_workdir(tmp_path / "run")
    main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "new/page.html")])
    assert (tmp_path / "new/page.html").exists() and "page.html (" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path)])
    assert "expected a folder with config.json" in capsys.readouterr().err


def test_without_its_libraries_it_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.raises(UsageError, match=r"plotly: pip install -e '.\[eval\]' in the repo"):
        write_report([str(make_workdir(tmp_path / "run"))])
