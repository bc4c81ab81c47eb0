// What opens over the page: the token, the reports, the keys.

import { json } from "./api.js";
import { byId, h } from "./dom.js";
import { bytes } from "./numbers.js";

export class TokenDialog {
  constructor() {
    this.dialog = byId("token");
    byId("token-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.dialog.close(byId("token-input").value.trim());
    });
    byId("token-cancel").addEventListener("click", () => this.dialog.close(""));
  }

  /** The token that was typed, or null. `wrong`: one was given before and refused. */
  ask(wrong) {
    if (this.dialog.open) return Promise.resolve(null);
    byId("token-wrong").hidden = !wrong;
    byId("token-input").value = "";
    this.dialog.returnValue = "";
    this.dialog.showModal();
    return new Promise((resolve) => {
      this.dialog.addEventListener("close", () => resolve(this.dialog.returnValue || null), { once: true });
    });
  }
}

export async function showReports() {
  const dialog = byId("reports");
  const place = byId("reports-list");
  place.replaceChildren(h("p", { class: "soft" }, "Looking …"));
  if (!dialog.open) dialog.showModal();
  try {
    const { folder, entries } = await json("alula/v1/runs");
    if (!entries.length) {
      place.replaceChildren(
        h("p", { class: "soft" }, folder ? `There is no report in ${folder} yet. ` : "The server was given no runs folder. ", "Start it with ", h("code", {}, "alula serve MODEL --runs runs"), "; ", h("code", {}, "alula audit"), " and ", h("code", {}, "alula quickstart"), " write some."),
      );
      return;
    }
    place.replaceChildren(
      h(
        "ul",
        { class: "reports" },
        entries.map((entry) =>
          h(
            "li",
            {},
            h("a", { href: sameOrigin(entry.url), target: "_blank", rel: "noopener" }, entry.title || entry.path),
            h("span", { class: "soft" }, `${entry.kind}, ${entry.path}, ${new Date(entry.modified * 1000).toLocaleString()}${entry.bytes ? `, ${bytes(entry.bytes)}` : ""}`),
          ),
        ),
      ),
    );
  } catch (error) {
    place.replaceChildren(h("p", {}, `${error.message} ${error.remedy ?? ""}`));
  }
}

/** An address on this server, or nothing. */
function sameOrigin(url) {
  try {
    const whole = new URL(url, location.href);
    return whole.origin === location.origin ? whole.href : null;
  } catch {
    return null;
  }
}
