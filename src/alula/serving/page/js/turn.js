// One turn on the page: the question, its answers side by side, what each cost, and where they differ.

import { AnswerText, certainty, rendered } from "./answer.js";
import { shownAttempt } from "./conversation.js";
import { differences, Marker, shownText } from "./differences.js";
import { button, h, perFrame } from "./dom.js";
import { parts } from "./marks.js";
import { plural, rate, seconds, whole } from "./numbers.js";
import { framed } from "./regions.js";

const MARKERS = [new Marker("only-a"), new Marker("only-b")];
const LETTERS = ["A", "B"];

export class TurnView {
  /** `page`: {inspect, retry, edit, token, say}, what the controls of a turn ask for. */
  constructor(turn, number, page) {
    Object.assign(this, { turn, number, page });
    this.lanes = turn.lanes.map((_, lane) => new LaneView(this, lane));
    this.tools = h("div", { class: "tools" });
    this.verdict = h("p", { class: "verdict", hidden: true });
    this.attempts = h("div", { class: "attempts-place" });
    this.element = h(
      "article",
      { class: "turn", "aria-label": `Question ${number}` },
      h("div", { class: "turn-number", "aria-hidden": "true" }, number),
      h("div", { class: "asked" }, media(turn), h("p", { class: "question" }, marked(turn)), this.tools),
      h("div", { class: turn.lanes.length > 1 ? "lanes two" : "lanes" }, this.lanes.map((lane) => lane.element)),
      this.verdict,
      this.attempts,
    );
    this.refresh();
  }

  /** Whether this is the last turn: that one can be asked again and edited. */
  setLast(last) {
    this.last = last;
    this.refresh();
  }

  refresh() {
    const busy = this.turn.lanes.some((lane) => ["waiting", "running"].includes(shownAttempt(lane)?.status));
    const failed = this.turn.lanes.some((lane) => shownAttempt(lane)?.error); // what failed has its own buttons
    this.tools.replaceChildren(
      ...(this.last && !busy && !failed
        ? [
            button({ text: "Ask again", symbol: "again", className: "quiet", on: () => this.page.retry() }),
            button({ text: "Edit", symbol: "edit", className: "quiet", on: () => this.page.edit() }),
          ]
        : []),
    );
    for (const lane of this.lanes) lane.refresh();
    this.compare(busy);
    this.table();
  }

  compare(busy) {
    for (const marker of MARKERS) marker.clear(this);
    const [a, b] = this.turn.lanes.map(shownAttempt);
    this.verdict.hidden = !a || !b || busy || ![a, b].every((each) => each.text && each.status !== "failed");
    if (this.verdict.hidden) return;
    const [left, right] = this.lanes.map((lane) => shownText(lane.text.element));
    if (left.text === right.text) {
      this.verdict.textContent = "Both gave the same answer, character for character.";
      return;
    }
    const found = differences(left.text, right.text);
    if (!found) {
      this.verdict.textContent = "The answers have so little in common that marking the differences would say nothing.";
      return;
    }
    MARKERS[0].set(this, found.a.map(left.range));
    MARKERS[1].set(this, found.b.map(right.range));
    this.verdict.textContent =
      found.words.a + found.words.b === 0
        ? "The answers differ in blanks alone."
        : `They differ: ${whole(found.words.a)} of ${plural(found.of.a, "word")} are in A alone, ${whole(found.words.b)} of ${whole(found.of.b)} in B alone (underlined).`;
  }

  /** Every attempt with its settings and what it cost: what a slider did. */
  table() {
    const rows = this.turn.lanes.flatMap((lane, which) => lane.attempts.map((each, i) => ({ each, which, i, shown: i === lane.shown })));
    const open = this.attempts.querySelector("details")?.open ?? true;
    if (!this.turn.lanes.some((lane) => lane.attempts.length > 1)) {
      this.attempts.replaceChildren();
      return;
    }
    const head = ["", "Image tokens", "Seconds", "Tokens/s", "Settings", "Answer"];
    this.attempts.replaceChildren(
      h(
        "details",
        { open, class: "attempts" },
        h("summary", {}, `${plural(rows.length, "attempt")} at this question`),
        h(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": "Attempts" },
          h(
            "table",
            {},
            h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col" }, text)))),
            h(
              "tbody",
              {},
              rows.map(({ each, which, i, shown }) =>
                h(
                  "tr",
                  { class: shown ? "shown" : null },
                  h("th", { scope: "row" }, button({ text: `${this.turn.lanes.length > 1 ? LETTERS[which] : ""}${i + 1}`, label: "", title: "Show this answer", className: "link", on: () => this.lanes[which].choose(i) })),
                  h("td", {}, each.report?.image_tokens?.of ? `${whole(each.report.image_tokens.kept)} of ${whole(each.report.image_tokens.of)}` : "–"),
                  h("td", {}, each.elapsed === null ? "–" : total(each).toFixed(2)),
                  h("td", {}, speed(each) === null ? "–" : rate(speed(each))),
                  h("td", { class: "words" }, settingsInWords(each)),
                  h("td", { class: "words" }, h("span", { class: "clipped" }, each.error ? each.error.message : each.text || "(nothing)")),
                ),
              ),
            ),
          ),
        ),
      ),
    );
  }

  forget() {
    for (const marker of MARKERS) marker.clear(this);
  }
}

class LaneView {
  constructor(view, lane) {
    Object.assign(this, { view, lane });
    this.head = h("div", { class: "lane-head" });
    this.body = h("div", { class: "answer", tabindex: "0" });
    this.readout = h("p", { class: "readout" });
    this.problem = h("div", { class: "problem-place" });
    this.element = h("section", { class: `lane lane-${lane}` }, this.head, this.body, this.problem, this.readout);
    this.waiting = []; // pieces that came since the last frame
    this.flush = perFrame(() => this.write());
    this.at = -1;
    const over = (event) => {
      const span = event.target.closest?.("[data-t]");
      if (span) this.point(Number(span.dataset.t));
    };
    this.body.addEventListener("pointerover", (event) => event.pointerType === "mouse" && !this.pinned && over(event));
    this.body.addEventListener("click", (event) => {
      if (event.target.closest("a")) return;
      const span = event.target.closest("[data-t]");
      if (!span || getSelection().toString()) return;
      this.pinned = !(this.pinned && this.at === Number(span.dataset.t));
      this.point(Number(span.dataset.t));
    });
    this.body.addEventListener("keydown", (event) => this.walk(event));
    this.attempt = null;
  }

  get model() {
    return this.view.turn.lanes[this.lane];
  }

  choose(index) {
    this.model.shown = index;
    this.pinned = false;
    this.view.refresh();
  }

  walk(event) {
    const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || event.target !== this.body || !this.attempt?.told || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const last = this.attempt.pieces.length - 1;
    this.pinned = true;
    this.point(Math.max(0, Math.min(last, this.at + steps[event.key])));
    this.view.page.say(this.attempt.pieces[this.at].text);
  }

  point(index) {
    if (!this.pinned && index === this.at && this.view.page.inspected() === this) return;
    this.at = index;
    const span = this.text.point(index);
    if (this.pinned) span?.scrollIntoView({ block: "nearest" });
    this.view.page.inspect(this, this.attempt, index);
  }

  unpoint() {
    this.at = -1;
    this.pinned = false;
    this.text?.point(-1);
  }

  /** A piece has come: shown with the next frame. */
  grow(piece, index) {
    this.waiting.push([piece, index]);
    this.flush();
  }

  write() {
    if (!this.waiting.length) return;
    for (const [piece, index] of this.waiting.splice(0)) this.text.push(piece.text, index, this.attempt.told ? certainty(piece) : null);
    this.status();
    this.view.page.grown();
  }

  refresh() {
    const shown = shownAttempt(this.model);
    if (!shown) return;
    const running = ["waiting", "running"].includes(shown.status);
    if (shown !== this.attempt) {
      this.attempt = shown;
      this.waiting = [];
      this.at = -1;
      this.text = running ? new AnswerText({ told: shown.told }) : rendered(shown);
      this.ended = !running;
      this.body.replaceChildren(this.text.element);
    } else if (!running && !this.ended) {
      this.write();
      this.text.end();
      this.ended = true;
    }
    this.element.classList.toggle("running", running);
    this.element.setAttribute("aria-busy", String(running));
    this.body.hidden = !running && !shown.text;
    const told = shown.told ? ". With the arrow keys you walk along its tokens" : "";
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", `Answer of ${shown.model}${told}`);
    this.body.tabIndex = shown.told ? 0 : -1;
    this.heading(shown);
    this.status();
    this.failure(shown);
  }

  heading(shown) {
    const { attempts, shown: index } = this.model;
    const two = this.view.turn.lanes.length > 1;
    const go = (to, label, symbol) => button({ label, symbol, className: "quiet small", disabled: to < 0 || to >= attempts.length, on: () => this.choose(to) });
    this.head.replaceChildren(
      two ? h("span", { class: "letter" }, LETTERS[this.lane]) : "",
      h("span", { class: "model" }, shown.model),
      attempts.length > 1 ? h("span", { class: "attempt-of" }, go(index - 1, "Earlier attempt", "left"), `${index + 1} of ${attempts.length}`, go(index + 1, "Later attempt", "right")) : "",
      shown.text && !["waiting", "running"].includes(shown.status)
        ? button({ label: "Copy the answer", symbol: "copy", className: "quiet small push", on: () => this.copy() })
        : "",
    );
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.attempt.text);
      this.view.page.say("Copied");
    } catch {
      getSelection().selectAllChildren(this.text.element); // no clipboard without HTTPS: it is selected, to be copied by hand
    }
  }

  status() {
    const shown = this.attempt;
    const facts = factsOf(shown);
    this.readout.replaceChildren(...facts.map(([text, title, strong]) => h("span", { class: strong ? "fact strong" : "fact", title }, text)));
  }

  failure(shown) {
    this.problem.replaceChildren();
    if (shown.status === "stopped") this.problem.append(h("p", { class: "note" }, "You stopped this answer."));
    if (shown.finish === "length") this.problem.append(h("p", { class: "note" }, `It ended at the longest answer that is set (${plural(shown.usage?.completion_tokens ?? shown.pieces.length, "token")}).`));
    if (shown.finish === "deadline") this.problem.append(h("p", { class: "note" }, "The server's deadline ended this answer."));
    if (!shown.error) {
      if (shown.status === "done" && !shown.text) this.problem.append(h("p", { class: "note" }, "The model ended its answer at once, without a word."));
      return;
    }
    const { message, remedy, kind } = shown.error;
    this.problem.append(
      h(
        "div",
        { class: "problem", role: "alert" },
        h("p", { class: "what" }, message),
        remedy ? h("p", { class: "remedy" }, remedy) : null,
        shown.text ? h("p", { class: "remedy" }, "What had arrived is kept above.") : null,
        this.view.last
          ? h(
              "div",
              { class: "actions" },
              kind === "token" ? button({ text: "Enter the token", className: "solid", on: () => this.view.page.token() }) : button({ text: "Try again", className: "solid", on: () => this.view.page.retry() }),
              button({ text: "Edit the question", on: () => this.view.page.edit() }),
            )
          : null,
      ),
    );
  }
}

function media(turn) {
  if (!turn.media.length) return null;
  return h(
    "div",
    { class: "media" },
    turn.media.map((medium) =>
      medium.type === "image"
        ? h("figure", {}, framed(medium))
        : h("figure", { class: "sound" }, h("audio", { src: medium.url, controls: true, preload: "metadata", "aria-label": medium.name }), h("figcaption", {}, `${medium.name}, ${seconds(medium.seconds)}`)),
    ),
  );
}

const marked = (turn) => parts(turn.text, turn.marks).map((part) => (part.marked ? h("mark", {}, part.text) : part.text));

const total = (shown) => shown.report?.seconds?.total ?? shown.elapsed;

function speed(shown) {
  const tokens = shown.usage?.completion_tokens ?? (shown.told ? shown.pieces.length : null);
  const timing = shown.report?.seconds;
  const spent = timing ? timing.total - timing.first_token : shown.elapsed;
  return tokens > 1 && spent > 0 ? (tokens - (timing ? 1 : 0)) / spent : null;
}

/** [text, explanation, strong] of each fact under an answer. */
function factsOf(shown) {
  if (shown.status === "waiting") return [["reading the question …", "The server has the question and computes the prompt", false]];
  const facts = [];
  const { report, usage } = shown;
  const images = report?.image_tokens;
  if (images?.of) facts.push([images.kept < images.of ? `${whole(images.kept)} of ${plural(images.of, "image token")}` : plural(images.of, "image token"), "Image tokens that the language model kept", images.kept < images.of]);
  const tokens = usage?.completion_tokens ?? (shown.told ? shown.pieces.length : null);
  if (tokens) facts.push([plural(tokens, "token"), "Tokens of the answer"]);
  if (shown.elapsed !== null && (shown.text || !shown.error)) facts.push([seconds(total(shown)), report?.seconds ? parted(report.seconds) : "As the browser saw it"]);
  if (report?.seconds) facts.push([`first after ${seconds(report.seconds.first_token)}`, "From the question to the first token"]);
  if (speed(shown) !== null && shown.status !== "running") facts.push([`${rate(speed(shown))} tokens/s`, "Behind the first token"]);
  if (report?.cached_tokens) facts.push([`${whole(report.cached_tokens)} reused`, "Tokens of the prompt that were already computed, in an earlier turn"]);
  if (report?.computed_by && report.computed_by !== shown.model) facts.push([`computed by ${report.computed_by}`, "With no picture to act on, this adapter leaves the base's own bits", true]);
  else if (report?.computed_by) facts.push([`computed by ${report.computed_by}`, "The model whose bits these are"]);
  return facts;
}

const parted = ({ queued, prefill, total: all }) =>
  [queued === undefined ? null : `queued ${seconds(queued)}`, prefill === undefined ? null : `prompt ${seconds(prefill)}`, `all ${seconds(all)}`].filter(Boolean).join(", ");

function settingsInWords({ model, settings }) {
  const words = [model];
  if (settings.budget) words.push(`keep ${whole(settings.budget)}`);
  words.push(settings.temperature ? `temperature ${settings.temperature}, seed ${settings.seed}` : "likeliest token");
  if (settings.highlight) words.push(`highlight × ${settings.strength.toFixed(2)}, guidance ${settings.guidance}`);
  return words.join("; ");
}

