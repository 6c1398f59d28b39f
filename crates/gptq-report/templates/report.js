"use strict";
// A click on a heading sorts by its column, a second one reverses the order; missing values come last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  for (const heading of table.tHead.rows[0].cells) {
    heading.firstElementChild.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[heading.cellIndex].dataset.v;
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (up ? 1 : -1);
      const order = (a, b) => (a === "") - (b === "") || (a === "" ? 0 : compare(a, b));
      body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
    });
  }
}
