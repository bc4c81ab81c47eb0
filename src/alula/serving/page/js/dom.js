// Elements are made here and nowhere from markup: text is text, whatever a model wrote in it.

/**
 * An element. `attributes` are attributes, but for `class`, `data` (an object for dataset), `on` (listeners) and
 * properties that have no attribute of their own (`value`, `checked`, `disabled`, `hidden`, `open`, `indeterminate`).
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open"]);

export const byId = (id) => document.getElementById(id);

/** An icon of the sheet in index.html; decoration, so the control beside it needs words of its own. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon, words, or both; with `label` alone the words are for those who do not see the icon. */
export function button({ label, text, symbol, title, className = "", on, disabled }) {
  return h(
    "button",
    { type: "button", class: className, "aria-label": text ? null : label, title: title ?? (text ? null : label), on: { click: on }, disabled },
    symbol ? icon(symbol) : null,
    text ? h("span", {}, text) : null,
  );
}

/** The calls of one frame as one; where the tab is hidden, where frames stand still, four a second. */
export function perFrame(work) {
  let waiting = false;
  const run = () => {
    waiting = false;
    work();
  };
  return () => {
    if (waiting) return;
    waiting = true;
    if (document.hidden) setTimeout(run, 250);
    else requestAnimationFrame(run);
  };
}

export function debounced(milliseconds, work) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), milliseconds);
  };
}
