/** Why a training runs in the gear it does. */

import { h } from "./dom.js";
import { count, duration } from "./format.js";
import { language, word } from "./words.js";

/** @param {object} of - `reason`, a line in English, and `because`, the same as data. */
export function reason(of) {
  if (!of?.reason) return null;
  const why = of.because?.why;
  if (language() === "en" || !why) return h("span", { lang: "en" }, of.reason);
  if (why === "measured") return h("span", {}, measured(of.because));
  const { cause } = of.because;
  return h("span", {}, word(`reason.${why}`, of.because),
    cause ? h("span", { lang: "en" }, ` (${cause})`) : null);
}

function measured(of) {
  const list = Object.entries(of.step_s).map(([gear, s]) =>
    word("reason.each", { gear, time: duration(s) })).join(", ");
  return [
    of.steps === null ? word("reason.unknown", of)
      : word("reason.steps", { n: count(of.steps), gear: of.gear }),
    word(of.remembered ? "reason.remembered" : "reason.measured", { list }),
    of.total_s === null ? "" : word("reason.total", { time: duration(of.total_s) }),
    of.ahead_after === null ? ""
      : word("reason.ahead", { n: count(of.ahead_after), surest: of.surest }),
    of.xla_loses ? word("reason.xla") : "",
  ].filter(Boolean).join(" ");
}
