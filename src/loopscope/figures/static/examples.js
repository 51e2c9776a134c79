/** The batch of an opened step: pictures, what they are, what they were taken for. */

import { fill, h } from "./dom.js";
import { number, value } from "./format.js";
import { word } from "./words.js";

const SHOWN = 24;
const PICTURE = /^data:image\/png;base64,[A-Za-z0-9+/=]+$/;

/** The examples, the worst first. */
export function examples(opened) {
  const found = opened.pictures?.length ? opened.pictures : (opened.worst ?? []);
  if (!found.length) return h("p.quiet", {}, word("examples.none"));
  const most = Math.max(...found.map((one) => number(one.loss)).filter(Number.isFinite), 1e-12);
  const list = h("ul.examples", {}, found.slice(0, SHOWN).map((one) => item(one, most)));
  const more = found.length > SHOWN
    ? h("button.plain", { type: "button", onclick: () => {
      fill(list, found.map((one) => item(one, most)));
      more.remove();
    } }, word("examples.all", { n: found.length })) : null;
  const wrong = found.filter(isWrong).length;
  return h("div", {},
    h("p.quiet", {}, word("examples.line", { n: found.length, wrong })), list, more);
}

/** A class that is another one; a number that is merely near is not called wrong. */
const isWrong = (one) =>
  Number.isInteger(one.label) && Number.isInteger(one.predicted) && one.label !== one.predicted;

function item(one, most) {
  const wrong = isWrong(one);
  const row = one.example ?? one.position;
  const loss = number(one.loss);
  const said = word(wrong ? "examples.wrong" : "examples.right", {
    label: one.label ?? "–", predicted: one.predicted ?? "–", loss: value(loss), row,
  });
  const part = Number.isFinite(loss) ? Math.max(0, loss) / most : 1;
  return h("li", { class: wrong ? "wrong" : null, title: said },
    PICTURE.test(one.picture ?? "")
      ? h("img", { src: one.picture, alt: said, width: 56, height: 56 })
      : h("span.nopicture", { "aria-hidden": "true" }, `#${row}`),
    h("span.verdict", {}, one.label === null ? "" : `${one.label}`,
      h("span.quiet", { "aria-hidden": "true" }, wrong ? " ≠ " : " = "),
      one.predicted === null ? "" : `${one.predicted}`),
    h("span.meter", { "aria-hidden": "true", style: { "--part": part } }),
    h("span.quiet", {}, value(loss, 3)));
}
