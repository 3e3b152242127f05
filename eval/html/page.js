"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const number = (text) => { const found = text.replace(/,/g, "").match(/^[+-]?\d+(\.\d+)?/); return found ? +found[0] : NaN; };
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].textContent.trim();
    const order = (a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      return Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
    };
    const rows = [...body.rows].sort(order);
    body.append(...(down ? rows.reverse() : rows));
  }));
}
const controls = document.querySelector("#filter");
if (controls) {
  const apply = () => {
    const { pair, change, task, text } = Object.fromEntries(new FormData(controls));
    const wanted = text.trim().toLowerCase();
    let shown = 0;
    for (const card of document.querySelectorAll(".card")) {
      let any = false;
      for (const question of card.querySelectorAll(".question")) {
        const changes = question.dataset.changes.split(" ");
        const fits = changes.some((c) => (!pair || c.split(":")[0] === pair) && (!change || c.split(":")[1] === change));
        const found = !wanted || question.textContent.toLowerCase().includes(wanted);
        question.hidden = !(fits && found && (!task || question.dataset.task === task));
        any = any || !question.hidden;
        shown += question.hidden ? 0 : 1;
      }
      card.hidden = !any;
    }
    document.querySelector("#shown").textContent = `${shown} shown`;
  };
  controls.addEventListener("input", apply);
  controls.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
