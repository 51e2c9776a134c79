/** What an event says, in a line: from its data, in the reader's language. */

import { h } from "./dom.js";
import { duration, general, number, size } from "./format.js";
import { reason } from "./reason.js";
import { said } from "./said.js";
import { nonfinite } from "./story.js";
import { language, word } from "./words.js";

const NAMED = 8;

/** A list of nodes and text. */
export function happened({ kind, data }) {
  const d = data ?? {};
  const parts = (LINES[kind] ?? plain)(d).filter((part) =>
    part !== null && part !== undefined && part !== "" && part !== false);
  return parts.flatMap((part, i) => (i ? [" · ", part] : [part]));
}

const theirs = (text) => (text ? h("span", { lang: "en" }, text) : null);

const LINES = {
  begin: (d) => [d.gear ?? d.chosen?.gear, reason(d.chosen)],
  compiled: (d) => [word(`event.${d.phase}`, {}, d.phase), d.gear, duration(d.wall_s),
    ...(d.changed ?? []).map(theirs)],
  gear: (d) => [d.gear, reason(d)],
  resume: (d) => [word("event.from", d), d.lost ? word("event.again", { n: d.lost }) : "",
    ...(d.notes ?? []).map(theirs)],
  branch: (d) => [d.parent, d.learning_rate ? word("event.rate", { rate: d.learning_rate }) : "",
    d.gear],
  incident,
  doctor: (d) => [word("event.findings", {
    n: (d.findings ?? []).length, of: (d.checks ?? []).length,
  })],
  warning: (d) => [d.category, theirs(d.message)],
  problem: (d) => [theirs(d.problem)],
  signal: (d) => [d.signal],
  error: (d) => [theirs(d.error)],
  control: (d) => [word(`event.${d.action}`, {}, d.action),
    d.done === false ? said("error.workers", d, d.why) : ""],
  checkpoint: (d) => [d.name, size(d.size_bytes), d.kept ? "" : word("events.removed")],
};

const plain = (d) => Object.values(d).filter((value) => typeof value !== "object").map(theirs);

/** A value out of the ordinary, and where it began. */
function incident(d) {
  if (language() === "en" || d.what === undefined) return [theirs(d.text ?? d.what)];
  const [kind, ...layer] = d.what.split("/");
  const name = word(`incident.${kind}`, {}, kind);
  const thing = layer.length
    ? word("incident.of", { layer: layer.join("/"), thing: name }) : name;
  const examples = (d.examples ?? []).slice(0, NAMED).join(", ");
  return [
    word(`incident.${d.incident}`, {
      step: d.at, thing, value: general(d.value, 4),
      times: d.usual === null ? "" : general(Math.abs(number(d.value)) / d.usual, 3),
    }),
    d.begins ? word("incident.first", { what: nonfinite(d.begins) }) : theirs(d.first),
    examples ? word(d.of_data ? "incident.data" : "incident.batch", { examples }) : "",
    d.problem ? [word("incident.problem"), theirs(` (${d.problem})`)] : "",
  ];
}
