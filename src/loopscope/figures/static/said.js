/**
 * What somebody else says: the server, a run, the doctor. It comes as a sentence in English and
 * as what it says, as data. English readers get the sentence; others get it told in their own
 * language, or, where there are no words for it, the sentence, marked as English.
 */

import { h } from "./dom.js";
import { language, word } from "./words.js";

/**
 * A sentence.
 * @param {string} key - Of the words for it.
 * @param {object} values - What stands in their braces.
 * @param {string} english - The sentence.
 * @param {string} tag - The element around it.
 */
export function said(key, values, english, tag = "span") {
  const own = language() === "en" ? null : word(key, values ?? {}, null);
  return own === null ? h(tag, { lang: "en" }, english) : h(tag, {}, own);
}

/** What went wrong, as the server says it: a sentence, and what to do. */
export function wrong({ error, next, code, about }) {
  const key = `error.${code}`;
  return [
    said(key, about, error, "strong"),
    about?.detail && language() !== "en" ? h("span", { lang: "en" }, ` ${about.detail}`) : null,
    next ? [" ", said(`${key}.next`, about, next)] : null,
  ];
}
