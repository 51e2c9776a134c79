/** Layers, variables and times of an opened step, in tables. */

import { h } from "./dom.js";
import { finite, number, percent, value } from "./format.js";
import { word } from "./words.js";

/** Every layer's output. */
export function layers(found) {
  if (!found?.length) return h("p.quiet", {}, word("layers.none"));
  return table("step.layers",
    ["layers.path", "layers.kind", "layers.shape", "layers.mean", "layers.std",
      "layers.range", "layers.zeros", "layers.gradient"],
    found.map((one) => [
      one.call ? `${one.path} (${one.call + 1})` : one.path, one.kind, one.shape.join("×"),
      value(one.mean, 3), value(one.std, 3), `${value(one.min, 3)} … ${value(one.max, 3)}`,
      percent(one.zeros), value(one.gradient_norm, 3),
    ]),
    found.map((one) => finite(one.finite) && one.finite < 1));
}

/** Gradients as the optimizer got them, and what it made of them. */
export function variables(opened) {
  const updates = new Map((opened.updates ?? []).map((one) => [one.path, one]));
  const found = opened.gradients ?? [];
  if (!found.length) return h("p.quiet", {}, word("variables.none"));
  return table("step.variables",
    ["variables.path", "variables.gradient", "variables.zeros", "variables.update", "variables.ratio"],
    found.map((one) => [
      one.path, value(one.norm, 3), percent(one.zeros),
      value(updates.get(one.path)?.norm, 3), value(updates.get(one.path)?.ratio, 3),
    ]),
    found.map((one) => number(one.norm) !== null && !finite(one.norm)));
}

/** Milliseconds of the eager execution. */
export function phases(found) {
  const rows = Object.entries(found ?? {});
  const most = Math.max(1e-12, ...rows.map(([, ms]) => ms));
  return h("ul.bars", {}, rows.map(([name, ms]) => h("li", {},
    h("span.name", {}, word(`part.${name}`, {}, name)),
    h("span.meter", { "aria-hidden": "true", style: { "--part": ms / most } }),
    h("span.number", {}, `${value(ms, 3)} ms`))));
}

/** A table whose first column names its rows; rows that are bad are marked. */
export function table(label, heads, rows, bad = []) {
  return h("div.scroll", { tabindex: "0", role: "group", "aria-label": word(label) },
    h("table", {},
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, word(head))))),
      h("tbody", {}, rows.map((row, i) => h("tr", { class: bad[i] ? "bad" : null },
        row.map((cell, k) => k === 0
          ? h("th", { scope: "row" }, bad[i] ? "! " : "", cell) : h("td", {}, cell)))))));
}
