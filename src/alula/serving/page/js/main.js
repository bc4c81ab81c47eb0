// Begins: makes the page, ties its menu and its keys.

import { App } from "./app.js";
import { showReports } from "./dialogs.js";
import { byId } from "./dom.js";

const app = new App();
const root = document.documentElement;

// ---- theme: the system's, unless one was chosen
for (const input of document.querySelectorAll("input[name=theme]")) {
  input.checked = input.value === (root.dataset.theme ?? "system");
  input.addEventListener("change", () => {
    if (input.value === "system") delete root.dataset.theme;
    else root.dataset.theme = input.value;
    try {
      if (input.value === "system") localStorage.removeItem("alula.theme");
      else localStorage.setItem("alula.theme", input.value);
    } catch {
      // it lasts as long as the page then
    }
  });
}

// ---- menu
const menu = byId("menu");
const closing = (work) => () => {
  menu.hidePopover();
  work();
};
byId("new").addEventListener("click", () => app.clear());
byId("save").addEventListener("click", closing(() => app.save()));
byId("open").addEventListener("click", closing(() => byId("open-file").click()));
byId("open-file").addEventListener("change", (event) => {
  if (event.target.files[0]) app.restore(event.target.files[0]);
  event.target.value = "";
});
byId("show-reports").addEventListener("click", closing(showReports));
byId("show-keys").addEventListener("click", closing(() => byId("keys").showModal()));
for (const dialog of document.querySelectorAll("dialog")) {
  for (const close of dialog.querySelectorAll("[data-close]")) close.addEventListener("click", () => dialog.close());
}

// ---- the panel: beside the conversation where there is room, over it elsewhere
const toggle = byId("panel-toggle");
const wide = matchMedia("(min-width: 1000px)");
function setPanel(open) {
  root.classList.toggle("panel-open", open);
  toggle.setAttribute("aria-expanded", String(open));
}
function togglePanel() {
  const open = !root.classList.contains("panel-open");
  setPanel(open);
  if (!wide.matches && open) byId(app.inspector.attempt ? "inspector-title" : "how-title").focus();
}
app.openPanel = () => setPanel(true);
app.inspector.closed = () => {
  app.inspectedLane?.unpoint();
  if (byId("inspector").contains(document.activeElement)) app.inspectedLane?.body.focus({ preventScroll: true });
  if (!wide.matches) setPanel(false);
};
setPanel(wide.matches);
wide.addEventListener("change", () => setPanel(wide.matches));
toggle.addEventListener("click", togglePanel);
byId("panel-close").addEventListener("click", () => {
  setPanel(false);
  toggle.focus();
});

// ---- keys; what is listed in the dialog "Keys" is this
const KEYS = {
  KeyN: () => app.clear(),
  KeyM: () => byId("model-a").focus(),
  KeyC: () => !byId("compare").disabled && app.setComparing(!app.comparing),
  KeyH: () => byId("marker").click(),
  KeyP: togglePanel,
  KeyR: () => app.retry(),
  KeyE: () => app.edit(),
  KeyA: () => app.views.at(-1)?.lanes[0].body.focus(),
};
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.matches?.("textarea, input:not([type=range]):not([type=checkbox]):not([type=radio]), select");
  if (event.altKey && !event.ctrlKey && !event.metaKey && KEYS[event.code]) {
    event.preventDefault();
    KEYS[event.code]();
  } else if (event.key === "Escape" && !menu.matches(":popover-open")) {
    if (app.running) app.stop();
    else if (app.leaveEdit()) byId("draft").focus();
    else if (app.composer.pen) app.composer.setPen(false);
    else if (app.inspector.attempt) app.inspector.clear();
    else if (!wide.matches && root.classList.contains("panel-open")) byId("panel-close").click();
  } else if (event.key === "?" && !typing) {
    byId("keys").showModal();
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    byId("draft").focus();
  }
});

root.classList.add("ready");
app.start();
