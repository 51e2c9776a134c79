/** Asking the server: the only place that knows addresses, the token and errors. */

import { word } from "./words.js";

const KEPT = "loopscope.token";

/**
 * What has gone wrong.
 * @param {object} said - What the server has said of it: `error`, `next`, `code`, `about`;
 *   `null` where the page itself says so, in the reader's language.
 */
export class Refused extends Error {
  constructor(message, next = "", said = null) {
    super(message);
    this.next = next;
    this.said = said;
  }
}

const token = taken();

/**
 * The token of the address. It is taken out of it, so that no bookmark and no picture of
 * the screen has it, and lasts as long as the tab.
 */
function taken() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = given.get("token");
  try {
    if (found !== null) sessionStorage.setItem(KEPT, found);
    given.delete("token");
    if (found !== null) history.replaceState(null, "", `#${given}`);
    return found ?? sessionStorage.getItem(KEPT) ?? "";
  } catch {
    return found ?? ""; // A browser that keeps nothing.
  }
}

/** GET; parameters that are `null` are left out. */
export function ask(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, given] of Object.entries(parameters)) {
    if (given !== null && given !== undefined) query.set(name, String(given));
  }
  return answered(`/api/${path}?${query}`, { signal });
}

/** POST. */
export function tell(path, body) {
  return answered(`/api/${path}`, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Loopscope-Token": token },
    body: JSON.stringify(body),
  });
}

async function answered(address, options) {
  let reply;
  try {
    reply = await fetch(address, { ...options, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(word("unreachable"), word("unreachable.next"));
  }
  let document = {};
  try {
    document = await reply.json();
  } catch {
    // What a proxy says is no JSON; its status is all there is.
  }
  if (reply.ok) return document;
  if (document.error) throw new Refused(document.error, document.next, document);
  throw new Refused(`HTTP ${reply.status}`, reply.status === 403 ? word("refused.next") : "");
}
