/** Gradients flowing back through the depth of a model, as a map of heat. */

import { h } from "./dom.js";
import { finite, number, value } from "./format.js";
import { word } from "./words.js";

/** @param {object} of - `paths` from input to output, `gradient_norm`, `update_ratio`. */
export function heat(of) {
  if (!of?.paths?.length) return h("p.quiet", {}, word("heat.none"));
  const gradient = scale(of.gradient_norm);
  const ratio = scale(of.update_ratio);
  return h("div.scroll", { tabindex: "0", role: "group", "aria-label": word("step.heat") },
    h("table.heat", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, word("heat.path")),
        h("th", { scope: "col" }, word("heat.gradient")),
        h("th", { scope: "col" }, word("heat.ratio")))),
      h("tbody", {},
        h("tr.end", {}, h("td", { colspan: "3" }, `↑ ${word("heat.input")}`)),
        of.paths.map((path, i) => h("tr", {}, h("th", { scope: "row" }, path),
          cell(of.gradient_norm?.[i], gradient), cell(of.update_ratio?.[i], ratio))),
        h("tr.end", {}, h("td", { colspan: "3" }, `↑ ${word("heat.output")}`)))));
}

/** From the smallest to the largest, by orders of magnitude. */
function scale(values) {
  const sizes = (values ?? []).map(number).filter((v) => Number.isFinite(v) && v > 0).map(Math.log10);
  const low = Math.min(...sizes), high = Math.max(...sizes);
  return (v) => (high - low < 1e-9 ? 0.5 : (Math.log10(v) - low) / (high - low));
}

function cell(given, of) {
  const v = number(given);
  if (v === null) return h("td", {}, "–");
  if (!finite(v)) return h("td.bad", {}, `! ${value(v)}`);
  const share = v > 0 ? of(v) : 0;
  return h("td.heated", { style: { "--heat-share": share.toFixed(3) } }, value(v, 3));
}
