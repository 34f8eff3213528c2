"""A page measured in a headless browser, without a driver: a second page frames it, measures it, and is dumped as text."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")

PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<pre id="result"></pre>
<script>
"use strict";
const SOURCES = /^(src|srcset|href|xlink:href|poster|data|action|formaction|background|ping)$/i;
const WIDTHS = %s, PAGE = %s;
const box = (element) => { const it = element.getBoundingClientRect(); return [it.left, it.top, it.right, it.bottom].map((x) => Math.round(10 * x) / 10); };
const name = (element) => element.tagName.toLowerCase() + (element.className && element.className.baseVal === undefined ? "." + element.className : "");
// Whether an ancestor scrolls, so that what is wider than it does not widen the page.
const scrolls = (element, view) => {
  for (let it = element.parentElement; it; it = it.parentElement)
    if (/auto|scroll|hidden/.test(view.getComputedStyle(it).overflowX) && it.tagName !== "BODY" && it.tagName !== "HTML") return true;
  return false;
};
const overlaps = (svg) => {
  const texts = [...svg.querySelectorAll("text")].map((it) => [it.textContent, box(it)]);
  const outer = box(svg), found = [];
  texts.forEach(([text, it], index) => {
    if (it[0] < outer[0] - 1 || it[1] < outer[1] - 1 || it[2] > outer[2] + 1 || it[3] > outer[3] + 1) found.push(text + " leaves the drawing");
    for (const [other, its] of texts.slice(index + 1)) {
      const wide = Math.min(it[2], its[2]) - Math.max(it[0], its[0]), high = Math.min(it[3], its[3]) - Math.max(it[1], its[1]);
      if (wide > 1 && high > 4) found.push(text + " over " + other);
    }
  });
  return found;
};
const measure = (frame) => {
  const view = frame.contentWindow, page = frame.contentDocument, all = [...page.querySelectorAll("body *")];
  const folded = [...page.querySelectorAll("details")];
  const shut = folded.filter((it) => !it.open).length;
  const drawing = (svg) => ({label: svg.getAttribute("aria-label"), box: box(svg), marks: svg.querySelectorAll("circle,rect,path,line").length,
                             folded: !!svg.closest("details")});
  const before = [...page.querySelectorAll("svg")].map(drawing);
  folded.forEach((it) => it.querySelector("summary").click());
  return {
    width: view.innerWidth, scroll_width: page.documentElement.scrollWidth, title: page.title,
    wide: all.filter((it) => it.getBoundingClientRect().right > view.innerWidth + 0.5 && !scrolls(it, view)).map(name),
    headings: [...page.querySelectorAll("h1,h2")].map((it) => [it.textContent, box(it)]),
    drawings_before: before, drawings: [...page.querySelectorAll("svg")].map(drawing),
    overlaps: [...page.querySelectorAll("svg")].flatMap(overlaps),
    images: [...page.querySelectorAll("img")].map((it) => [it.alt, it.naturalWidth, box(it)]),
    scrolled: [...page.querySelectorAll(".scroll,.plot")].filter((it) => it.scrollWidth > it.clientWidth + 1).map((it) => it.closest("section").querySelector("h2").textContent),
    num_folded: folded.length, shut, opened: folded.map((it) => [it.open, it.querySelector("pre,svg") ? box(it.querySelector("pre,svg")) : null]),
    pres: [...page.querySelectorAll("pre")].map((it) => it.textContent),
    scripts: page.scripts.length, handlers: all.flatMap((it) => [...it.attributes]).filter((it) => /^on/i.test(it.name)).length,
    requests: [...view.performance.getEntriesByType("resource").map((it) => it.name),
               ...all.flatMap((it) => [...it.attributes]).filter((it) => SOURCES.test(it.name)).map((it) => it.value)].filter((it) => !it.startsWith("data:")),
    ink: [...page.querySelectorAll("svg .mark")].map((it) => view.getComputedStyle(it).fill),
  };
};
const results = [];
(async () => {
  try {
    for (const width of WIDTHS) {
      const frame = document.createElement("iframe");
      frame.style = `border:0;width:${width}px;height:1000px`;
      frame.src = PAGE;
      await new Promise((done) => { frame.onload = done; document.body.append(frame); });
      results.push(measure(frame));
    }
    document.getElementById("result").textContent = JSON.stringify(results);
  } catch (error) { document.getElementById("result").textContent = JSON.stringify({error: String(error)}); }
})();
</script>
"""


def find_browser() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


def measure(page: Path, widths: tuple[int, ...], folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(measurements, what the console said) of a page at each width of its viewport in pixels."""
    probe = folder / "probe.html"
    probe.write_text(PROBE % (json.dumps(widths), json.dumps(page.as_uri())), encoding="utf-8")
    command = [
        find_browser() or "",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--disable-web-security",  # the probe may look into the page it frames
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        probe.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    results = json.loads(html.unescape(found[1]))
    assert isinstance(results, list), results
    console = [line.split("CONSOLE", 1)[1] for line in done.stderr.splitlines() if "CONSOLE" in line]
    return results, console
