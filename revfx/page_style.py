"""How a page looks, and its one script: the search in the table of values, and its sorting."""

from __future__ import annotations


STYLE = """
.revfx { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; box-sizing: border-box }
.revfx * { box-sizing: border-box }
.revfx .title { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; color: inherit }
.revfx .title small { font-size: 1rem; font-weight: 400; color: var(--muted) }
.revfx section h2 { font-size: 1.1rem; margin: 0 0 .6rem; color: inherit }
.revfx .lead { margin: .3rem 0 0; color: var(--muted) }
.revfx section, .revfx .cards { margin-top: 1.8rem }
.revfx .cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)) }
.revfx .card { border: 1px solid var(--faint); border-radius: .5rem; padding: .7rem 1rem; font-size: .87rem;
  color: var(--muted) }
.revfx .card strong { display: block; font-size: 1.55rem; line-height: 1.35; color: var(--ink) }
.revfx .ours { color: var(--revfx); font-weight: 600 }
.revfx .wide { overflow-x: auto }
.revfx .tall { max-height: 36rem; overflow: auto; border: 1px solid var(--faint); border-radius: .5rem }
.revfx .wide:focus-visible, .revfx input:focus-visible, .revfx button:focus-visible, .revfx summary:focus-visible {
  outline: 2px solid var(--revfx); outline-offset: 2px }
.revfx svg { display: block; max-width: 100%; min-width: 36rem; height: auto; margin: 0 auto }
.revfx table { border-collapse: collapse; font-size: .87rem; text-align: left; margin: 0; width: 100%;
  color: inherit }
.revfx caption { text-align: left; color: var(--muted); font-size: .82rem; padding: 0 0 .4rem }
.revfx th, .revfx td { padding: .32rem .75rem; border-bottom: 1px solid var(--faint); vertical-align: top;
  text-align: left; background: none; white-space: normal }
.revfx tbody tr { background: none }
.revfx thead th { font-weight: 600; white-space: nowrap }
.revfx .number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.revfx td small { color: var(--muted); margin-left: .35rem }
.revfx code, .revfx pre, .revfx #rows td { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: .8rem; color: inherit }
.revfx code { background: var(--outside); border-radius: .25rem; padding: .1em .3em }
.revfx pre { margin: .6rem 0 0; line-height: 1.45; background: none }
.revfx ul { margin: 0; padding-left: 1.2rem }
.revfx .advice { border-left: .25rem solid var(--recompute-edge); padding-left: 1rem }
.revfx .remedy { color: var(--muted) }
.revfx .place { white-space: nowrap; font-size: .82rem }
.revfx summary { cursor: pointer; font-weight: 600 }
.revfx .search { display: flex; flex-wrap: wrap; gap: .7rem; align-items: center; margin: 0 0 .7rem }
.revfx .search label { font-weight: 600 }
.revfx .search input { flex: 0 1 22rem; min-width: 10rem; font: inherit; padding: .35rem .6rem; color: inherit;
  background: var(--paper); border: 1px solid var(--outside-edge); border-radius: .4rem }
.revfx .search output { color: var(--muted) }
.revfx #values thead th { position: sticky; top: 0; background: var(--outside); padding: 0 }
.revfx #values button { all: unset; box-sizing: border-box; width: 100%; padding: .4rem .5rem; cursor: pointer;
  text-align: inherit; white-space: nowrap }
.revfx #values button:focus-visible { outline: 2px solid var(--revfx); outline-offset: -2px }
.revfx th[aria-sort=ascending] button::after { content: " ▲" }
.revfx th[aria-sort=descending] button::after { content: " ▼" }
.revfx #rows td { white-space: nowrap; padding: .32rem .5rem }
.revfx #rows .how { white-space: normal; min-width: 13rem; overflow-wrap: anywhere }
.revfx #rows span { border-radius: .3rem; padding: .1em .45em }
.revfx .save { background: var(--save); color: var(--save-edge) }
.revfx .invert { background: var(--invert); color: var(--invert-edge) }
.revfx .recompute { background: var(--recompute); color: var(--recompute-edge) }
"""

SCRIPT = """
"use strict";
(() => {
  const box = document.getElementById("search");
  if (!box) return;
  const body = document.getElementById("rows"), count = document.getElementById("count");
  const rows = Array.from(body.rows, row => [row, row.textContent.toLowerCase()]);
  const most = 500;  // rows that are laid out at once: more would make typing slow
  const number = n => n.toLocaleString("en");
  const search = () => {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let hits = 0;
    for (const [row, text] of rows) {
      const hit = words.every(word => text.includes(word));
      hits += hit;
      row.hidden = !hit || hits > most;
    }
    count.textContent = (words.length ? `${number(hits)} of ` : "") + `${number(rows.length)} values`
      + (hits > most ? `, the first ${number(most)} shown` : "");
  };
  const fromAddress = () => {
    const given = new URLSearchParams(location.hash.slice(1)).get("search");
    if (given === null) return;
    box.value = given;
    search();
    document.getElementById("values").scrollIntoView();
  };
  box.addEventListener("input", search);
  window.addEventListener("hashchange", fromAddress);
  const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  document.querySelectorAll("#values thead th").forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    head.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const compare = new Intl.Collator("en", { numeric: true }).compare;
    rows.sort(([a], [b]) => (up ? 1 : -1) * compare(key(a, column), key(b, column)));
    body.append(...rows.map(([row]) => row));
    search();
  }));
  search();
  fromAddress();
})();
"""
