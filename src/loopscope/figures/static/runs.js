/** The list of runs: one is in focus, others can be laid over it. */

import { at, fill, h } from "./dom.js";
import { count, duration, moment, value } from "./format.js";
import { beside, chosen, focus, known, on } from "./store.js";
import { colour, shapeOf } from "./colours.js";
import { word } from "./words.js";

/** Begin. */
export function begin() {
  on(["runs", "run", "beside", "look"], draw);
}

function draw() {
  const body = at("runs").querySelector(".body");
  const focused = body.contains(document.activeElement) ? document.activeElement.id : "";
  fill(body, known.runs.length
    ? h("ul", {}, known.runs.map(item))
    : h("p.quiet", {}, word("runs.none")));
  if (focused) at(focused)?.focus();
}

function item(run, index) {
  const here = run.id === chosen.run;
  const over = chosen.beside.has(run.id);
  const name = title(run);
  return h("li", { class: here ? "here" : null },
    h("input", {
      type: "checkbox", id: `over-${index}`, checked: here || over, disabled: here,
      "aria-label": word("runs.over", { name }), title: word("runs.over", { name }),
      style: { "accent-color": here || over ? colour(run.id) : "" },
      onchange: (event) => beside(run.id, event.target.checked),
    }),
    h("button", {
      type: "button", id: `run-${index}`, "aria-current": here ? "true" : null,
      onclick: () => focus(run.id),
    },
      h("span.name", {}, here || over ? h("span.sign", {
        "aria-hidden": "true", style: { color: colour(run.id) },
      }, shapeOf(run.id), " ") : null, name),
      h("span.quiet", {},
        h(`span.state.${run.status.replace(/\W/g, "")}`, {}, word(`status.${run.status}`)),
        " · ", run.gear ?? "–"),
      h("span.quiet", {}, word("runs.line", {
        steps: count(run.steps), loss: value(run.loss),
      })),
      h("span.quiet", {}, moment(run.created)),
      run.problem ? h("span.bad", { lang: "en" }, run.problem) : null));
}

/** What a run is called on the page. */
export function title(run) {
  if (!run) return "…";
  const last = String(run.path ?? "").split("/").filter(Boolean).pop();
  return run.id === "." ? (last ?? ".") : run.id;
}
