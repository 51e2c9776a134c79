/**
 * The story of a step, told from its data: what carried the loss, what was done with it, what
 * else could have been.
 *
 * Knows neither the server nor what is chosen. In English it is what `Why.story()` says in
 * Python; a test holds the two equal.
 */

import { h } from "./dom.js";
import { general, finite, number, percentage } from "./format.js";
import { word } from "./words.js";

const ROWS = 8;

/** @param {object} why - `Why.as_dict()`. */
export function story(why) {
  return h("div.story", {}, paragraphs(why).map(({ text, under }) =>
    h("div", {}, h("p", {}, text), under.map((line) => h("p.under", {}, line)))));
}

/** Where the numbers of a step stopped being finite, in a line. */
export function nonfinite(of) {
  const what = word(`nonfinite.${of.what}`, {}, of.what);
  const parts = [word(of.layer ? "nonfinite.layer" : "nonfinite", { ...of, what })];
  if (of.phase) {
    parts.push(word("nonfinite.when", { phase: word(`part.${of.phase}`, {}, of.phase) }));
  }
  if (of.examples?.length) {
    parts.push(word("nonfinite.rows", { rows: of.examples.slice(0, ROWS).join(", ") }));
  }
  return parts.join("");
}

/** Sentences, each with the lines that belong to it. */
function paragraphs(why) {
  const first = why.first_nonfinite;
  return [
    { text: ofTheLoss(why), under: [] },
    first ? { text: word("story.nonfinite", { what: nonfinite(first) }), under: [] } : null,
    ofTheExamples(why),
    ofTheGradients(why),
    had("story.earlier", why.earlier),
    had("story.later", why.later),
  ].filter(Boolean);
}

function ofTheLoss(why) {
  const loss = number(why.loss);
  const usual = number(why.usual_loss);
  if (loss === null) return word("story.none", { step: why.step });
  const said = { step: why.step, loss: general(loss, 6) };
  if (usual === null || !(usual > 0)) return word("story.loss", said);
  const times = loss / usual;
  return word(times >= why.limits.spike || !finite(times) ? "story.spike" : "story.quiet",
    { ...said, times: general(times, 2), usual: general(usual, 6) });
}

function ofTheExamples({ examples, size }) {
  if (!examples.length) return null;
  const shares = examples.map((one) => number(one.share)).filter((share) => share !== null);
  const sum = shares.reduce((all, share) => all + share, 0);
  return {
    text: shares.length ? word("story.carry", {
      n: examples.length, size, share: percentage(sum), even: percentage(examples.length / size),
    }) : word("story.wrong"),
    under: examples.map(example),
  };
}

function example(of) {
  const where = of.example === null ? word("story.position", { n: of.position })
    : word("story.row", { n: of.example });
  return [
    word("story.example", { where, loss: general(of.loss, 4) }),
    of.label === null ? null : word("story.label", of),
    of.predicted === null ? null : word("story.taken", of),
  ].filter(Boolean).join(", ");
}

function ofTheGradients({ history, gradients, updates, limits }) {
  if (!history.length) return null;
  const n = history.length;
  if (!gradients.length) {
    return { text: word("story.still", { jump: general(limits.jump, 3), n }), under: [] };
  }
  const moved = new Set(updates.map((one) => one.path));
  return {
    text: word("story.jumped", { n }),
    under: gradients.slice(0, limits.named).map(({ path, norm, times }) => {
      const jump = word("story.jump", { path, norm: general(norm, 4), times: general(times, 3) });
      return moved.has(path) ? jump : word("story.tamed", { jump });
    }),
  };
}

/** What a loss would have been. */
function had(key, found) {
  if (!found.length) return null;
  return {
    text: word(key),
    under: found.map(({ kind, norm, loss }) => word("story.had", {
      loss: loss === null ? word("story.noloss") : general(loss, 6),
      change: word(`story.${kind}`, { norm: general(norm, 3) }),
    })),
  };
}
