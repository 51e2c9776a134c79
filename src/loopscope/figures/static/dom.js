/** Making elements. Text goes in as text: nothing from a run is ever read as HTML. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element.
 * @param {string} name - Its tag; `tag.class.class` for short.
 * @param {object} attributes - `onclick` and its like are listeners, `style` an object
 *   of CSS properties, `true` an attribute without a value; `null` and `false` are left
 *   out.
 * @param {...*} children - Nodes, text, lists of them; `null` and `false` are left out.
 */
export function h(name, attributes = {}, ...children) {
  return filled(document.createElement(name.split(".")[0]), name, attributes, children);
}

/** The same for SVG. */
export function svg(name, attributes = {}, ...children) {
  return filled(
    document.createElementNS(SVG, name.split(".")[0]), name, attributes, children
  );
}

function filled(node, name, attributes, children) {
  const classes = name.split(".").slice(1);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") {
      for (const [property, of] of Object.entries(value)) {
        node.style.setProperty(property, of);
      }
    } else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...kept(children));
  return node;
}

/** Put children in the place of all that an element has. */
export function fill(node, ...children) {
  node.replaceChildren(...kept(children));
  return node;
}

function kept(children) {
  return children
    .flat(Infinity)
    .filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : String(child)));
}

/** Set text only where it differs: what a screen reader has read is not read again. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** The element of the page with this id. */
export const at = (id) => document.getElementById(id);
