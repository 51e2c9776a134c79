/** Where the bits of a replay depart from those of the record, and what may be the reason. */

import { h } from "./dom.js";
import { number } from "./format.js";
import { language, word } from "./words.js";

/** @param {object} of - `Departure.as_dict()`. */
export function difference(of) {
  if (language() === "en") return h("span", {}, of.text);
  return h("span", {},
    word("difference", { ...of, relative: number(of.relative)?.toExponential(1) }),
    of.kinds.map((kind, i) => [h("br"), cause(kind, of.causes[i], of.details[i])]));
}

/** What it is about in the reader's language; what exactly, as it is. */
function cause(kind, text, exactly) {
  const what = word(`cause.${kind}`, {}, null);
  if (what === null) return h("span", { lang: "en" }, text);
  return [word("cause", { what }), exactly ? h("span", { lang: "en" }, ` (${exactly})`) : null];
}
