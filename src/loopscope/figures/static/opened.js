/**
 * An opened step, laid out: what was computed, from a document of docs/page.md. It knows
 * no server, so that a notebook shows a step by it as well.
 */

import { difference } from "./difference.js";
import { h } from "./dom.js";
import { examples } from "./examples.js";
import { count, value } from "./format.js";
import { heat } from "./heat.js";
import { nonfinite, story } from "./story.js";
import { layers, phases, variables } from "./tables.js";
import { word } from "./words.js";

/** Everything of a step, for `fill`. */
export function layout(opened) {
  const first_ = opened.first_nonfinite;
  return [
    h("div.facts", {}, facts(opened)),
    first_ ? h("p.trouble", {}, h("strong", {}, word("step.nonfinite")), " ",
      nonfinite(first_)) : null,
    bitsApart(opened),
    opened.why ? part("step.why", "why", story(opened.why)) : null,
    opened.why_not ? part("step.why", "why", h("p", { lang: "en" }, opened.why_not)) : null,
    part("step.examples", "pictures", examples(opened)),
    h("div.columns", {},
      part("step.heat", "heat", heat(opened.heat)),
      part("step.layers", "layers", layers(opened.layers)),
      part("step.variables", "variables", variables(opened)),
      part("step.phases", "times", phases(opened.phases))),
    opened.missing?.length ? part("step.missing", "missing",
      h("ul", { lang: "en" }, opened.missing.map((text) => h("li", {}, text)))) : null,
  ];
}

const part = (title, name, node) =>
  h("section.part", { class: `part ${name}` }, h("h3", {}, word(title)), node);

function facts(opened) {
  const differs = opened.loss_difference;
  const bits = opened.same_bits;
  const again = bits !== undefined; // Of a run; of a loop as it stands there is no record.
  return h("dl.gauges", {},
    again ? fact("step.place", word("step.batch", { epoch: (opened.epoch ?? 0) + 1,
      index: count(opened.batch_index) })) : null,
    fact("gauge.gear", opened.gear ?? "–"),
    fact("step.rate", value(opened.learning_rate)),
    fact(again ? "step.loss" : "gauge.loss", value(opened.loss, 7)),
    again ? fact("step.recorded", value(opened.recorded_loss, 7)) : null,
    again ? fact("step.same", bits === true ? `✓ ${word("step.bits")}`
      : bits === false ? `✗ ${word("step.nobits")}` : "–", bits === false ? "bad" : "good") : null,
    differs !== null && differs !== undefined
      ? fact("step.differs", value(differs, 3)) : null,
    Object.entries(opened.losses ?? {}).length > 1
      ? Object.entries(opened.losses).map(([name, of]) =>
        h("div", {}, h("dt", {}, name), h("dd", {}, value(of, 6)))) : null);
}

/** Where a replay departs from the record, if it does. */
function bitsApart(opened) {
  if (opened.same_bits !== false || !opened.difference) return null;
  return h("p.trouble", {}, h("strong", {}, word("step.nobits")), " ",
    difference(opened.difference));
}

const fact = (name, said, kind = null) =>
  h("div", {}, h("dt", {}, word(name)), h("dd", { class: kind }, said));
