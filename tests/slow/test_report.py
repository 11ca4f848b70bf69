"""The report in a browser: it draws, sorts, shows hostile text as text, and fits a phone."""
import html
import re
import shutil
import subprocess

import pytest

from test_plot import made_up
from tools.report import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")]
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=3000 --dump-dom".split()


def browser(file, address=""):
    """The page as Chromium builds it, and the text of each sample."""
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={file.parent}/profile", f"file://{file}{address}"]
    dom = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
    return dom, [html.unescape(re.sub("<[^>]*>", "", x)) for x in re.findall("<article.*?</article>", dom, re.S)]


def test_the_page_draws_sorts_and_fits_a_phone(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page(made_up(tmp_path / "run")))
    dom, last = browser(file)
    assert "<title>forger: run</title>" in dom and all("base modelthoughtbase step 4" in text for text in last)
    best_first = browser(file, "#step=2&sort=-reward")[1]
    assert [int(re.search(r"step 2 text (\d)", text)[1]) for text in best_first] == [7, 4, 1, 5, 2, 6, 3, 0]
    assert all(text.count("</script><script>document.title='hacked'</script>") == 3 for text in best_first)
    all_steps = browser(file, "#all=true&sort=p_real")[1]  # null comes last
    assert [re.search(r"text (\d)", text)[1] for text in all_steps] == sorted("01245673" * 5, key="01245673".index)
    probe = """<script>const all = [...document.querySelectorAll("html, pre, dl, picture, p, header")];
        parent.postMessage(all.filter(x => x.scrollWidth > x.clientWidth).length, "*")</script></body>"""
    file.write_text(file.read_text().replace("</body>", probe))
    (tmp_path / "phone.html").write_text(
        "<body><script>onmessage = event => document.body.dataset.cut = event.data</script>"
        "<iframe src='page.html' style='width: 390px; height: 844px; border: 0'></iframe></body>")
    assert 'data-cut="0"' in browser(tmp_path / "phone.html")[0]
