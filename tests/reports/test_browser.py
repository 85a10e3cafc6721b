"""The page in a real browser: no error, nothing asked for, and all of it by keyboard."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.reports.page import render
from mergekit_dam.reports.schema import parse
from tests.kit.reports import report_values

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
    "--dump-dom",
)

DRIVER = """
<script>
const said = [], tipped = () => tip.hidden ? null : tip.textContent;
const press = (picture, key) =>
  picture.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const map = document.querySelector("[data-table=map-1]");
const gain = document.querySelector("[data-table=gain]");
map.querySelectorAll(".cells rect")[4].dispatchEvent(new PointerEvent("pointerenter"));
said.push(["hover", tipped()]);
map.dispatchEvent(new PointerEvent("pointerleave"));
said.push(["left", tipped()]);
for (const key of ["Home", "ArrowDown", "ArrowRight", "End", "ArrowRight", "ArrowUp", "Escape"]) {
  press(map, key);
  said.push([key, tipped()]);
}
press(gain, "ArrowDown");
said.push(["row", tipped()]);
const background = () => getComputedStyle(document.body).backgroundColor;
const before = background();
document.getElementById("theme").click();
said.push(["theme", before === background() ? "same" : "changed"]);
said.push(["overflow", document.documentElement.scrollWidth > innerWidth]);
said.push(["requests", performance.getEntriesByType("resource").map((entry) => entry.name)]);
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(said);
document.body.append(result);
</script>
"""


def opened(folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """What the driver saw in the page, and what the browser logged of it."""
    html = render(parse(report_values(3), "file"), "out")
    page = folder / "page.html"
    page.write_text(html.replace("</body>", f"{DRIVER}</body>"), "utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        *OPTIONS,
        f"--window-size={width},900",
        f"--user-data-dir={folder / 'user'}",
    ]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    (result,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    return dict(json.loads(unescape(result))), done.stderr


@pytest.mark.parametrize("width", [1280, 390])
def test_pointer_keys_and_theme_work_and_nothing_is_asked_for(tmp_path: Path, width: int) -> None:
    said, logged = opened(tmp_path, width)
    assert "CONSOLE" not in logged
    assert said["requests"] == []
    assert said["overflow"] is False
    assert said["hover"].startswith("layer 1, self_attn.q_proj\n")
    assert said["left"] is None
    assert said["Home"].startswith("layer 0, self_attn.q_proj\n")
    assert said["ArrowDown"].startswith("layer 0, self_attn.k_proj\n")
    assert said["ArrowRight"].startswith("layer 2, self_attn.k_proj\n")  # the last: at the end
    assert said["End"].startswith("layer 2, self_attn.k_proj\n")
    assert said["ArrowUp"].startswith("layer 2, self_attn.q_proj\n")
    assert said["Escape"] is None
    assert said["row"].startswith("model german\naverage: 1.3000\n")
    assert said["theme"] == "changed"
