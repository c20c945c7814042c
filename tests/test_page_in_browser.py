"""The report's page and the documents' pictures in a real browser, light and dark; left out where there is none."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_kernels.__main__ import main
from lora_kernels.bench import results
from tests.test_benchmarks import a_run

ROOT = Path(__file__).parent.parent
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome"),
]
# What the page looks like, as its title: each drawing's size, texts that stick out of it, colours, the widest overflow.
LOOK = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const out = [...svg.querySelectorAll("text")].filter(text => {
      const b = text.getBoundingClientRect();
      return b.width && (b.left < box.left - 1 || b.right > box.right + 1 ||
                         b.top < box.top - 1 || b.bottom > box.bottom + 1);
    }).map(text => text.textContent);
    return {width: box.width, height: box.height, texts: svg.querySelectorAll("text").length, out};
  });
  const style = getComputedStyle(document.body);
  const text = document.querySelector("svg text");
  document.title = JSON.stringify({found, page: style.backgroundColor, ink: style.color,
    drawn: text ? getComputedStyle(text).fill : "", wide: document.documentElement.scrollWidth - innerWidth});
})</script>"""


def look(html: str, folder: Path, dark: bool, width: int = 1280):
    """What a browser makes of a page."""
    import html as entities
    import json

    file = folder / "looked.html"
    file.write_text(html.replace("</head>", LOOK + "</head>"), encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [*scheme, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None, done.stderr
    return json.loads(entities.unescape(title[1]))


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_a_report(tmp_path, dark):
    pytest.importorskip("matplotlib")
    results.save(a_run(), tmp_path / "a.json")
    assert main(["report", str(tmp_path)]) == 0
    seen = look((tmp_path / "report.html").read_text(), tmp_path, dark)
    assert len(seen["found"]) == 3, "price, growth and roofline"
    for drawing in seen["found"]:
        assert drawing["width"] > 600 and drawing["height"] > 200 and drawing["texts"] > 5
        assert drawing["out"] == []
    page, ink, drawn = (brightness(seen[name]) for name in ("page", "ink", "drawn"))
    assert (
        (page < 0.2 and min(ink, drawn) > 0.8) if dark else (page > 0.9 and max(ink, drawn) < 0.2)
    )
    assert seen["wide"] <= 0, "nothing makes the page scroll sideways"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    "picture", sorted((ROOT / "docs/pictures").glob("*.svg")), ids=lambda p: p.stem
)
def test_the_pictures_of_the_documents(picture, tmp_path, dark):
    """Every word lies within its picture."""
    svg = picture.read_text(encoding="utf-8")
    seen = look(f"<!doctype html><head><title></title></head><body>{svg}</body>", tmp_path, dark)
    (drawing,) = seen["found"]
    assert drawing["texts"] > 5 and drawing["out"] == []
    assert (brightness(seen["drawn"]) > 0.8) == dark
