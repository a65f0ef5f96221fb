"use strict";
(() => {
  const box = document.getElementById("search");
  if (!box) return;
  const body = document.getElementById("rows"), count = document.getElementById("count");
  const rows = Array.from(body.rows, row => [row, row.textContent.toLowerCase()]);
  const most = 500;  // rows that are laid out at once: more would make typing slow
  const number = n => n.toLocaleString("en");
  const search = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
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
