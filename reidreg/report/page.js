"use strict";
// The page is complete without this script, which only filters and sorts the rows.
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const rows = document.getElementById("rows");
  const original = [...rows.children];
  const count = document.getElementById("count");

  const matches = (row, choice) =>
    ["group", "camera", "person"].every((key) => !choice[key] || row.dataset[key] === choice[key]);

  const sorted = (order) => {
    const sign = { up: 1, down: -1 }[order];
    if (!sign) return original;
    // Sorting is stable: rows of equal precision keep their original order.
    return [...original].sort((a, b) => sign * (a.dataset.precision - b.dataset.precision));
  };

  const apply = () => {
    const choice = Object.fromEntries(new FormData(form));
    let shown = 0;
    for (const row of original) {
      row.hidden = !matches(row, choice);
      shown += !row.hidden;
    }
    rows.append(...sorted(choice.order));
    rows.classList.toggle("without-left-out", !choice.out);
    count.textContent = `${shown} of ${original.length} queries`;
  };

  form.addEventListener("input", apply);
  // The fields are reset only after the event.
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
