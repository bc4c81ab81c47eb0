// Filters of the browsers of items; without scripts every item is still there, under its heading.
for (const browser of document.querySelectorAll("[data-browser]")) {
  const bar = browser.querySelector(".filters");
  const groups = [...browser.querySelectorAll("details")];
  const items = [...browser.querySelectorAll(".exchange")];
  const values = {
    group: groups.map((group) => group.dataset.group),
    direction: items.map((item) => item.dataset.direction),
    family: items.map((item) => item.dataset.family).sort(),
  };
  const selects = [...bar.querySelectorAll("select")];
  for (const select of selects) {
    for (const value of ["all", ...new Set(values[select.dataset.filter])]) select.add(new Option(value));
    select.addEventListener("change", show);
  }
  function show() {
    const chosen = Object.fromEntries(selects.map((select) => [select.dataset.filter, select.value]));
    const fits = (key, value) => chosen[key] === "all" || chosen[key] === value;
    let count = 0;
    for (const group of groups) {
      group.hidden = !fits("group", group.dataset.group);
      if (chosen.group !== "all" && !group.hidden) group.open = true;
      for (const item of group.querySelectorAll(".exchange")) {
        item.hidden = !(fits("direction", item.dataset.direction) && fits("family", item.dataset.family));
        if (!item.hidden && !group.hidden) count += 1;
      }
    }
    bar.querySelector("output").textContent = `${count} shown`;
  }
  bar.hidden = false;
  show();
}
