/** How curves are drawn: axis, scale, smoothing, range, which of them. */

import { at, fill, h } from "./dom.js";
import { groupsOf } from "./groups.js";
import { chosen, known, on, open } from "./store.js";
import { word } from "./words.js";

const AXES = ["step", "epoch", "time"];
const AT_FIRST = 2;

/** What is chosen; `null`: nothing yet, the curves say what suits them. */
export const how = { axis: "step", log: null, weight: 0.6, range: null, groups: null };

let heard = null;

/**
 * Begin.
 * @param {object} listener - `redraw()` and `zoomBy(factor)`.
 */
export function begin(listener) {
  heard = listener;
  on("open", (step) => { if (at("go-step")) at("go-step").value = step; });
}

/** Whether a logarithm says something of a group: a share of 0 to 1 it does not. */
export function logarithmic(name) {
  const group = groupsOf(known.run?.names).find((one) => one.name === name);
  return Boolean(group && (group.outputs.length || group.signals.length));
}

/** The names of the groups that are shown: the first ones, unless others were chosen. */
export function groupsShown() {
  return how.groups ?? groupsOf(known.run?.names).slice(0, AT_FIRST).map((one) => one.name);
}

/** Draw them. */
export function tools() {
  const groups = groupsOf(known.run?.names);
  const focused = document.activeElement?.id;
  fill(at("curve-tools"), axes(), scale(), smoothing(), zooming(), which(groups), going());
  if (focused) at(focused)?.focus();
}

const changed = (change) => (event) => { change(event.target); heard.redraw(); };

const axes = () => h("fieldset", {}, h("legend", {}, word("curves.axis")), AXES.map((axis) =>
  h("label.choice", {}, h("input", {
    type: "radio", name: "axis", id: `axis-${axis}`, checked: how.axis === axis,
    onchange: changed(() => { how.axis = axis; how.range = null; }),
  }), word(`axis.${axis}`))));

const scale = () => h("label.choice", {}, h("input", {
  type: "checkbox", id: "log", checked: how.log === true,
  onchange: changed((of) => { how.log = of.checked; }),
}), word("curves.log"));

const smoothing = () => h("label.slider", {}, word("curves.smooth"), h("input", {
  type: "range", id: "smooth", min: 0, max: 0.99, step: 0.01, value: how.weight,
  oninput: changed((of) => { how.weight = Number(of.value); }),
}));

const zooming = () => h("span.buttons", { role: "group", "aria-label": word("curves.zoom") },
  [["in", "+", 0.5], ["out", "−", 2], ["all", "⤢", null]].map(([name, sign, by]) =>
    h("button.plain", {
      type: "button", id: `zoom-${name}`, title: word(`zoom.${name}`),
      "aria-label": word(`zoom.${name}`), onclick: () => heard.zoomBy(by),
    }, sign)));

const which = (groups) => h("fieldset", {}, h("legend", {}, word("curves.which")),
  groups.map((group, i) => h("label.choice", {}, h("input", {
    type: "checkbox", id: `group-${i}`, checked: groupsShown().includes(group.name),
    onchange: changed((of) => {
      const shown = groupsShown();
      how.groups = groups.map((one) => one.name).filter((name) =>
        (name === group.name ? of.checked : shown.includes(name)));
    }),
  }), group.name)));

/** For whoever does not point: a step by its number. */
const going = () => h("form.go", { onsubmit: go },
  h("label", { for: "go-step" }, word("curves.open")),
  h("input", { id: "go-step", type: "number", min: 0, step: 1, inputmode: "numeric",
    value: chosen.step }),
  h("button", { type: "submit" }, word("open")));

function go(event) {
  event.preventDefault();
  const field = at("go-step");
  if (field.value !== "") open(Number(field.value));
}
