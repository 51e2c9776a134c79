/** Questions that take a while: asking, telling how far they are, and what went wrong. */

import { ask, tell, Refused } from "./api.js";
import { fill, h } from "./dom.js";
import { duration } from "./format.js";
import { wrong } from "./said.js";
import { word } from "./words.js";

const EVERY_MS = 300;

/**
 * Ask for something that runs in a process of its own, and wait for what it gives.
 * @param {string} kind - `open`, `compare` or `doctor`.
 * @param {object} body - What is sent.
 * @param {function} heard - Told of the job whenever the server has been asked; it may
 *   have a part of the result before it is done.
 * @param {function} wanted - Whether anyone still waits; the server is told if not.
 * @returns {object} The result; `null` if nobody wants it any more.
 */
export async function work(kind, body, heard, wanted = () => true) {
  const { job } = await tell(kind, body);
  for (;;) {
    if (!wanted()) {
      await tell("cancel", { id: job });
      return null;
    }
    const found = await ask("job", { id: job });
    if (found.state === "done") return found.result;
    if (found.state === "failed") throw failure(found.error);
    heard(found);
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

const failure = (error) =>
  (error ? new Refused(error.error, error.next, error) : new Refused(word("failed")));

/** Show how far a job is; null for one that has just been asked for. */
export function busy(node, job) {
  const text = doing(job?.doing);
  const since = job?.seconds ? ` ${duration(job.seconds)}` : "";
  if (!node.querySelector("progress")) {
    fill(node, h("progress", { "aria-label": word("working") }),
      h("span", { role: "status" }), h("span.quiet"));
  }
  const [, said, time] = node.children;
  if (said.textContent !== text) said.textContent = text;
  time.textContent = since;
}

function doing(of) {
  if (!of) return word("starting");
  const check = of.check && word(`check.${of.check}`, {}, of.check);
  return word(`job.${of.what}`, { ...of, check });
}

/** Show an error, and what to do. */
export function sorry(node, error) {
  const own = error instanceof Refused;
  if (!own) console.error(error);
  fill(node, h("div.trouble", { role: "alert" }, error.said ? wrong(error.said) : [
    h("strong", { lang: own ? null : "en" }, error.message),
    error.next ? ` ${error.next}` : null,
  ]));
}
