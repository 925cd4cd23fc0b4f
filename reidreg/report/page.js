"use strict";
// The page is whole without this: it only hides rows and puts them in another order.
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const rows = document.getElementById("rows");
  const asWritten = [...rows.children];
  const count = document.getElementById("count");

  const fits = (row, choice) =>
    ["sort", "camera", "person"].every((key) => !choice[key] || row.dataset[key] === choice[key]);

  const inOrder = (order) => {
    const sign = { up: 1, down: -1 }[order];
    if (!sign) return asWritten;
    // Sorting is stable: equal precision keeps the written order.
    return [...asWritten].sort((a, b) => sign * (a.dataset.precision - b.dataset.precision));
  };

  const apply = () => {
    const choice = Object.fromEntries(new FormData(form));
    let shown = 0;
    for (const row of asWritten) {
      row.hidden = !fits(row, choice);
      shown += !row.hidden;
    }
    rows.append(...inOrder(choice.order));
    rows.classList.toggle("without-left-out", !choice.out);
    count.textContent = `${shown} of ${asWritten.length} queries`;
  };

  form.addEventListener("input", apply);
  // The fields have their first values only after the event.
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
})();
