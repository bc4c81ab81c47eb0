// Where a question is written: its words, the marks on them, and what is attached.

import { button, byId, debounced, h, icon } from "./dom.js";
import { moved, parts, toggled, trimmed, wordAt } from "./marks.js";
import { medium, picture } from "./media.js";
import { seconds } from "./numbers.js";
import { framed, RegionEditor } from "./regions.js";
import { Recorder } from "./sound.js";

const STORED = "alula.draft";

export class Composer {
  /** `page`: {ask, stop, takes, reads, say, mediaChanged, lastEdit}. */
  constructor(page) {
    this.page = page;
    this.form = byId("composer");
    this.draft = byId("draft");
    this.mirror = byId("mirror");
    this.tray = byId("tray");
    this.marker = byId("marker");
    this.notice = byId("notice");
    this.marks = [];
    this.media = [];
    this.pen = false;
    this.editor = new RegionEditor();
    this.recorder = null;
    this.before = "";
    this.keep = debounced(200, () => this.store());
    this.listen();
    this.recall();
    this.show();
  }

  listen() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.draft.addEventListener("input", () => {
      this.marks = moved(this.marks, this.before, this.draft.value);
      this.show();
      this.keep();
    });
    this.draft.addEventListener("scroll", () => (this.mirror.scrollTop = this.draft.scrollTop));
    this.draft.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      } else if (event.key === "ArrowUp" && !this.draft.value && !this.media.length) {
        event.preventDefault();
        this.page.lastEdit();
      }
    });
    this.draft.addEventListener("pointerup", () => this.pen && setTimeout(() => this.markSelection(true)));
    this.marker.addEventListener("click", () => {
      if (this.draft.selectionStart !== this.draft.selectionEnd) this.markSelection(false);
      else this.setPen(!this.pen);
    });
    byId("stop").addEventListener("click", () => this.page.stop());
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", (event) => {
      this.take([...event.target.files]);
      event.target.value = "";
    });
    byId("record").addEventListener("click", () => this.record());
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      this.take(files);
    });
    let inside = 0;
    const carries = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    document.addEventListener("dragenter", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      inside += 1;
      document.documentElement.classList.add("dropping");
    });
    document.addEventListener("dragover", (event) => carries(event) && event.preventDefault());
    document.addEventListener("dragleave", (event) => {
      if (!carries(event)) return;
      inside = Math.max(0, inside - 1);
      document.documentElement.classList.toggle("dropping", inside > 0);
    });
    document.addEventListener("drop", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      inside = 0;
      document.documentElement.classList.remove("dropping");
      this.take([...event.dataTransfer.files]);
    });
  }

  async take(files) {
    for (const file of files) {
      try {
        this.media.push(await medium(file, this.page.takes(), this.page.reads()));
        this.say(null);
      } catch (error) {
        this.say(error.message);
      }
    }
    this.show();
    this.page.mediaChanged();
    this.draft.focus();
  }

  async record() {
    const recording = byId("record");
    if (this.recorder) {
      const recorder = this.recorder;
      this.recorder = null;
      recording.setAttribute("aria-pressed", "false");
      try {
        const { url, seconds: length } = await recorder.stop();
        this.media.push({ type: "audio", name: "recording.wav", url, seconds: length, regions: [] });
        this.say(null);
      } catch (error) {
        this.say(error.message);
      }
      this.show();
      this.page.mediaChanged();
      return;
    }
    if (this.page.takes() && !this.page.takes().includes("audio")) {
      this.say("The model takes no sounds. Choose one that does.");
      return;
    }
    try {
      const recorder = new Recorder();
      await recorder.start();
      this.recorder = recorder;
      recording.setAttribute("aria-pressed", "true");
      this.say("Recording. Press the microphone again to end it.");
    } catch (error) {
      this.say(error.message);
    }
  }

  /** Mark what is selected; with the pen, a click marks the word under it. */
  markSelection(byPen) {
    let [start, stop] = trimmed(this.draft.value, this.draft.selectionStart, this.draft.selectionEnd);
    if (start >= stop) {
      const word = byPen ? wordAt(this.draft.value, this.draft.selectionStart) : null;
      if (!word) return;
      [start, stop] = word;
    }
    this.marks = toggled(this.marks, start, stop);
    this.draft.setSelectionRange(stop, stop);
    this.show();
    this.keep();
    const text = this.draft.value.slice(start, stop);
    this.page.say(this.marks.some(([from, to]) => from <= start && stop <= to) ? `Highlighted: ${text}` : `No longer highlighted: ${text}`);
    this.draft.focus();
  }

  setPen(on) {
    this.pen = on;
    this.marker.setAttribute("aria-pressed", String(on));
    this.form.classList.toggle("pen", on);
    this.say(on ? "Highlighter: drag over words of your question, or click one. The model will attend to them more." : null);
    if (on) this.draft.focus();
  }

  say(text) {
    this.notice.textContent = text ?? "";
    this.notice.hidden = !text;
  }

  show() {
    const text = this.draft.value;
    this.before = text;
    this.mirror.replaceChildren(...parts(text, this.marks).map((part) => (part.marked ? h("mark", {}, part.text) : part.text)), "​");
    this.draft.style.height = "auto";
    this.draft.style.height = `${Math.min(this.draft.scrollHeight, innerHeight * 0.32)}px`;
    this.tray.hidden = !this.media.length;
    this.tray.replaceChildren(...this.media.map((each, index) => this.attached(each, index)));
    byId("send").disabled = !text.trim();
  }

  attached(each, index) {
    const remove = button({
      label: `Remove ${each.name}`,
      symbol: "close",
      className: "remove",
      on: () => {
        this.media.splice(index, 1);
        this.show();
        this.page.mediaChanged();
        this.draft.focus();
      },
    });
    if (each.type === "audio") {
      return h("li", { class: "attached sound" }, h("audio", { src: each.url, controls: true, "aria-label": each.name }), h("span", {}, `${each.name}, ${seconds(each.seconds)}`), remove);
    }
    const count = each.regions.length;
    const open = h(
      "button",
      { type: "button", class: "picture", "aria-label": `Highlight parts of ${each.name}${count ? ` (${count} now)` : ""}`, on: { click: () => this.editor.open(each, () => this.show()) } },
      framed(each),
      h("span", { class: "hint" }, icon("pen"), count ? `${count} highlighted` : "highlight parts"),
    );
    return h("li", { class: "attached" }, open, remove);
  }

  send() {
    if (!this.draft.value.trim()) {
      this.draft.focus();
      return;
    }
    const question = { text: this.draft.value, media: this.media, marks: this.marks };
    if (this.page.ask(question)) this.clear();
  }

  clear() {
    this.set({ text: "", media: [], marks: [] });
    this.setPen(false);
    this.say(null);
  }

  set({ text, media, marks }) {
    this.draft.value = text;
    this.media = [...media];
    this.marks = [...marks];
    this.show();
    this.keep();
    this.page.mediaChanged();
  }

  /** A sample: its pictures and its question. */
  async fill({ text, media }) {
    this.set({ text, media: await Promise.all(media.map((each, i) => picture(each.name ?? `sample ${i + 1}`, each.url))), marks: [] });
  }

  get empty() {
    return !this.draft.value.trim() && !this.media.length;
  }

  store() {
    const draft = { text: this.draft.value, marks: this.marks, media: this.media };
    try {
      sessionStorage.setItem(STORED, JSON.stringify(draft));
    } catch {
      try {
        sessionStorage.setItem(STORED, JSON.stringify({ ...draft, media: [] })); // pictures may be larger than what a tab may keep
      } catch {
        // the words live as long as the page then
      }
    }
  }

  recall() {
    try {
      const { text, marks, media } = JSON.parse(sessionStorage.getItem(STORED));
      this.draft.value = text;
      this.marks = marks.filter(([start, stop]) => 0 <= start && start < stop && stop <= text.length);
      this.media = media.filter((each) => each.url.startsWith("data:"));
    } catch {
      // there was no draft
    }
  }
}
