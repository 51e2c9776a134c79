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
 * @returns {object} The result; `null` if nobody wants it any more, or it was cancelled.
 */
export async function work(kind, body, heard, wanted = () => true) {
  const { job } = await tell(kind, body);
  for (;;) {
    if (!wanted()) {
      // One that has begun is let run: the process is needed for the next question.
      await tell("cancel", { id: job, only: "waiting" });
      return null;
    }
    const found = await ask("job", { id: job });
    if (found.state === "done") return found.result;
    if (found.state === "cancelled") return null;
    if (found.state === "failed") throw failure(found.error);
    heard(found);
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

const failure = (error) =>
  (error ? new Refused(error.error, error.next, error) : new Refused(word("failed")));

/** Show how far a job is, and a way to cancel it; null for one that has just been asked for. */
export function busy(node, job) {
  const text = doing(job?.doing);
  const since = job?.seconds ? ` ${duration(job.seconds)}` : "";
  if (!node.querySelector("progress")) {
    fill(node, h("progress", { "aria-label": word("working") }),
      h("span", { role: "status" }), h("span.quiet"),
      h("button.plain.cancel", { type: "button", hidden: true, onclick: () => cancel(node) }));
  }
  const [, said, time, button] = node.children;
  if (said.textContent !== text) said.textContent = text;
  time.textContent = since;
  button.hidden = !job;
  if (!job || button.dataset.job === job.id) return;
  button.dataset.job = job.id;
  button.textContent = word("cancel");
  button.removeAttribute("aria-disabled");
}

/** Have the job that is shown ended; whoever waits for it hears of that. */
async function cancel(node) {
  const button = node.querySelector(".cancel");
  if (button.hasAttribute("aria-disabled")) return;
  button.setAttribute("aria-disabled", "true");
  button.textContent = word("cancelling");
  try {
    await tell("cancel", { id: button.dataset.job });
  } catch (error) {
    sorry(node, error);
  }
}

/** Say that a job was cancelled; `back` is where the keyboard goes on. */
export function cancelled(node, back) {
  fill(node, h("p.quiet", { role: "status" }, word("cancelled")));
  back?.focus();
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
