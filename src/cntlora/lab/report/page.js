"use strict";
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const boxes = [...document.querySelectorAll("[data-toggle]")];
  const shown = () => new Set(boxes.filter((box) => box.checked).map((box) => box.dataset.toggle));
  const root = document.documentElement;
  const touch = matchMedia("(pointer: coarse)").matches;
  const drawn = new Set();

  // Plots: drawn when they come near the window, filtered and coloured like the page.
  const colour = (name) => {
    const probe = document.createElement("i");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const themed = (layout) => {
    const changes = { "font.color": colour("ink"), "hoverlabel.bgcolor": colour("raised"), "hoverlabel.font.color": colour("ink"), "modebar.color": colour("soft"), "modebar.activecolor": colour("accent") };
    for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      changes[`${axis}.gridcolor`] = colour("grid");
      changes[`${axis}.linecolor`] = colour("line");
    }
    return changes;
  };
  const visibility = (data, methods) => data.map((trace) => methods.has(trace.meta.method) && !(trace.meta.band && methods.size > content.bands));
  const draw = (box) => {
    const { data, layout } = content.plots[box.id];
    const methods = shown();
    visibility(data, methods).forEach((visible, i) => { data[i].visible = visible; });
    if (touch) layout.dragmode = false; // a finger scrolls the page; the buttons zoom
    Plotly.newPlot(box, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: touch ? true : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: box.id },
    }).then(() => { // only now: what the filter or the theme did meanwhile would have met half a plot
      box.style.minHeight = "";
      drawn.add(box);
      return Plotly.update(box, { visible: visibility(box.data, shown()) }, themed(layout));
    });
  };
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting && !drawn.has(target)) { near.unobserve(target); draw(target); }
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll(".plot").forEach((box) => near.observe(box));
  addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach((box) => {
    near.unobserve(box);
    if (!drawn.has(box)) draw(box);
  }));
  const recolour = () => drawn.forEach((box) => Plotly.relayout(box, themed(box.layout)));

  // The filter: rows, plots of one method, and traces.
  const filter = () => {
    const methods = shown();
    document.querySelectorAll("[data-method]").forEach((part) => { part.hidden = !methods.has(part.dataset.method); });
    drawn.forEach((box) => Plotly.restyle(box, { visible: visibility(box.data, methods) }));
    document.getElementById("count").textContent = `${methods.size} of ${boxes.length}`;
  };
  const presets = {
    all: () => true,
    none: () => false,
    ours: (box) => box.dataset.group === "ours",
    others: (box) => box.dataset.group !== "ours",
    top: (box) => "top" in box.dataset,
  };
  boxes.forEach((box) => box.addEventListener("change", filter));
  document.querySelectorAll("[data-preset]").forEach((button) => button.addEventListener("click", () => {
    boxes.forEach((box) => { box.checked = presets[button.dataset.preset](box); });
    filter();
  }));
  const narrow = matchMedia("(max-width: 860px)");
  if (narrow.matches) document.getElementById("filter").open = false;

  // Sorting: up, down, as it was; rows without a number stay last.
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const compare = (column, sign) => (one, other) => {
    const [a, b] = [value(one, column), value(other, column)];
    if (a !== null && b !== null) return sign * (a - b);
    if (a !== null || b !== null) return a === null ? 1 : -1;
    return sign * one.cells[column].textContent.localeCompare(other.cells[column].textContent);
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.querySelectorAll("tr.heads th")];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort") ?? "none"];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next !== "none") head.setAttribute("aria-sort", next);
      table.classList.toggle("sorted", next !== "none");
      const sign = next === "descending" ? -1 : 1;
      body.append(...(next === "none" ? original : [...original].sort(compare(column, sign))));
    }));
  });

  // Samples: one at a time, chosen by its name.
  document.querySelectorAll("[data-pick]").forEach((select) => {
    const sheets = [...select.closest(".gallery").querySelectorAll("[data-sample]")];
    const pick = () => sheets.forEach((sheet) => { sheet.hidden = sheet.dataset.sample !== select.value; });
    select.addEventListener("change", pick);
    select.parentElement.hidden = false;
    pick();
  });

  // The sources of the tables.
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  };
  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    await copy(content.tables[button.dataset.copy][button.dataset.format]);
    const words = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = words; }, 1200);
  }));

  // Light, dark, or as the system has it.
  const theme = document.getElementById("theme");
  const next = { auto: "light", light: "dark", dark: "auto" };
  theme.addEventListener("click", () => {
    const chosen = next[root.dataset.theme ?? "auto"];
    if (chosen === "auto") delete root.dataset.theme;
    else root.dataset.theme = chosen;
    theme.textContent = `Theme: ${chosen}`;
    recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  filter();
})();
