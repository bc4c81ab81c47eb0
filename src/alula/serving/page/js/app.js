// The page: a conversation, the server behind it, and what happens between them.

import { Announcer } from "./announcer.js";
import { json, keepToken, ServerError, stream, token } from "./api.js";
import { Composer } from "./composer.js";
import { attempt, Conversation, shownAttempt } from "./conversation.js";
import { TokenDialog } from "./dialogs.js";
import { byId, debounced, h } from "./dom.js";
import { Inspector } from "./inspector.js";
import { plural } from "./numbers.js";
import { Settings } from "./settings.js";
import { TurnView } from "./turn.js";

const STORED = "alula.conversation";
const CHOSEN = "alula.models";
const OTHERS = 5; // likeliest tokens that are asked for beside the one taken
const SAMPLES = 8; // that are offered; those with pictures first
const REFRESH = 15000; // ms between looks for models that were loaded meanwhile

export class App {
  constructor() {
    this.models = [];
    this.formats = null; // that the server reads, by medium
    this.conversation = new Conversation();
    this.views = [];
    this.running = null; // the AbortController of the answers under way
    this.editing = null;
    this.announcer = new Announcer();
    this.inspector = new Inspector();
    this.settings = new Settings();
    this.settings.changed = (name, other) => this.changed(name, other);
    this.tokenDialog = new TokenDialog();
    this.preview = debounced(250, () => this.lookAhead());
    this.thread = byId("thread");
    this.scroller = byId("scroller");
    this.composer = new Composer({
      ask: (question) => this.ask(question),
      stop: () => this.stop(),
      takes: () => this.takes(),
      reads: () => this.formats?.image ?? null,
      say: (text) => this.announcer.say(text),
      mediaChanged: () => this.preview(),
      lastEdit: () => this.edit(),
    });
    this.listen();
  }

  listen() {
    for (const id of ["model-a", "model-b"]) byId(id).addEventListener("change", () => this.chosen());
    byId("compare").addEventListener("click", () => this.setComparing(!this.comparing));
    byId("connection-again").addEventListener("click", () => this.connect());
    byId("system").addEventListener("input", () => (this.conversation.system = byId("system").value));
    byId("latest").addEventListener("click", () => this.toEnd());
    this.scroller.addEventListener("scroll", () => this.atEnd(), { passive: true });
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.models.length && performance.now() - this.refreshed > REFRESH) this.connect({ quiet: true });
    });
    addEventListener("pagehide", () => this.store());
  }

  // ---- the server

  async start() {
    this.recall();
    await this.connect();
    try {
      const [{ samples }, { limits, formats }] = await Promise.all([json("alula/v1/samples"), json("alula/v1/server")]);
      this.samples = samples;
      this.formats = formats;
      this.settings.longest(limits.answer_tokens);
    } catch {
      this.samples = []; // they are a courtesy, and what is too much is refused in words
    }
    this.showEmpty();
  }

  /** Ask for the models. Whether the server answered. */
  async connect({ quiet = false } = {}) {
    const again = byId("connection-again");
    again.disabled = true;
    try {
      const { data } = await json("v1/models");
      this.refreshed = performance.now();
      this.connected();
      this.offer(data.map((each) => ({ name: each.id, ...each.alula })));
      this.preview();
      return true;
    } catch (error) {
      if (error.kind === "token") {
        if (await this.askToken()) return this.connect({ quiet });
        this.disconnected(error);
      } else if (!quiet) this.disconnected(error);
      return false;
    } finally {
      again.disabled = false;
    }
  }

  async askToken() {
    const given = await this.tokenDialog.ask(Boolean(token()));
    if (given === null) return false;
    keepToken(given);
    return true;
  }

  connected() {
    byId("connection").hidden = true;
  }

  disconnected(error) {
    const place = byId("connection");
    byId("connection-words").textContent = error instanceof ServerError ? `${error.message} ${error.remedy}` : String(error);
    place.hidden = false;
  }

  offer(models) {
    const before = [byId("model-a").value, byId("model-b").value];
    const kept = before[0] ? before : (chosenBefore() ?? []);
    this.models = models;
    const names = models.map((each) => each.name);
    const tuned = models.find((each) => each.base) ?? models[1];
    const wanted = [names.includes(kept[0]) ? kept[0] : names[0], names.includes(kept[1]) ? kept[1] : (tuned?.name ?? names[0])];
    ["model-a", "model-b"].forEach((id, lane) => {
      const choices = models.map((each) => h("option", { value: each.name }, each.name));
      if (!choices.length) choices.push(h("option", { value: "" }, "no model is loaded"));
      byId(id).replaceChildren(...choices);
      byId(id).value = wanted[lane] ?? "";
    });
    byId("compare").disabled = models.length < 2;
    if (models.length < 2) this.setComparing(false);
    this.chosen();
  }

  served(lane = 0) {
    const name = byId(lane ? "model-b" : "model-a").value;
    return this.models.find((each) => each.name === name) ?? null;
  }

  takes() {
    const lanes = this.comparing ? [this.served(0), this.served(1)] : [this.served(0)];
    return lanes.some((each) => !each?.takes) ? null : lanes.map((each) => each.takes).reduce((a, b) => a.filter((word) => b.includes(word)));
  }

  chosen() {
    try {
      sessionStorage.setItem(CHOSEN, JSON.stringify({ names: [byId("model-a").value, byId("model-b").value], comparing: this.comparing }));
    } catch {
      // the first ones are offered again then
    }
    const takes = this.takes();
    byId("attach").disabled = takes !== null && !takes.some((word) => word === "image" || word === "audio");
    byId("record").hidden = takes !== null && !takes.includes("audio");
    byId("files").accept = (takes ?? ["image", "audio"]).filter((word) => word === "image" || word === "audio").map((word) => `${word}/*`).join(",");
    this.showEmpty();
    this.preview();
  }

  setComparing(on) {
    this.comparing = on;
    document.documentElement.classList.toggle("comparing", on);
    byId("compare").setAttribute("aria-pressed", String(on));
    byId("model-b-place").hidden = !on;
    this.chosen();
  }

  /** What the budget will do to the pictures of the question that is being written, or of the last one that has any. */
  async lookAhead() {
    const pictures = (each) => each.media.filter((medium) => medium.type === "image");
    const question = [...this.conversation.turns, this.composer].findLast((each) => pictures(each).length);
    const images = question ? pictures(question) : [];
    const served = this.served();
    if (!images.length || !served?.takes?.includes("image")) {
      this.settings.preview(null);
      return;
    }
    const text = question === this.composer ? this.composer.draft.value : question.text;
    const content = [...images.map((each) => ({ type: "image_url", image_url: { url: each.url } })), { type: "text", text: text || " " }];
    const body = { model: served.name, messages: [{ role: "user", content }] };
    if (this.settings.values.budget !== null) body.alula = { image_tokens: this.settings.values.budget };
    try {
      const told = await json("alula/v1/preview", body);
      this.settings.pictures(Math.max(...told.images.map((each) => each.tokens)));
      this.settings.preview(told);
    } catch (error) {
      byId("budget-effect").textContent = error.message; // it will be said again, louder, if it stops the answer
    }
  }

  // ---- asking

  /** Whether the question was taken. */
  ask(question) {
    if (this.running) {
      this.composer.say("An answer is still under way. Stop it first, or wait.");
      return false;
    }
    if (!this.models.length) {
      this.composer.say(byId("connection").hidden ? "The server has no model loaded." : null);
      if (!byId("connection").hidden) this.connect();
      return false;
    }
    this.editing = null;
    const turn = this.conversation.add(question, this.comparing ? 2 : 1);
    this.show(turn);
    this.answer(turn);
    return true;
  }

  retry() {
    const turn = this.conversation.last;
    if (turn && !this.running) this.answer(turn);
  }

  edit() {
    const turn = this.conversation.last;
    if (!turn || this.running) return;
    if (!this.composer.empty) {
      this.composer.say("There is a question in writing. Send it or clear it first.");
      this.composer.draft.focus();
      return;
    }
    this.conversation.turns.pop();
    const view = this.views.pop();
    view.forget();
    view.element.remove();
    this.views.at(-1)?.setLast(true);
    this.editing = turn;
    this.composer.set(turn);
    this.composer.say("You edit your last question. Escape leaves it as it was.");
    this.composer.draft.focus();
    this.inspector.clear();
    this.showEmpty();
    this.store();
  }

  /** Leave the last question as it was before it was taken up for editing. */
  leaveEdit() {
    if (!this.editing) return false;
    const turn = this.editing;
    this.editing = null;
    this.conversation.turns.push(turn);
    this.show(turn);
    this.composer.clear();
    return true;
  }

  stop() {
    this.running?.abort();
  }

  async answer(turn) {
    const controller = new AbortController();
    this.running = controller;
    document.documentElement.classList.add("answering");
    const view = this.views.at(-1);
    const { values } = this.settings;
    const runs = turn.lanes.map((lane, which) => {
      const model = byId(which ? "model-b" : "model-a").value;
      const made = attempt(model, { ...values });
      made.told = values.inside;
      lane.attempts.push(made);
      lane.shown = lane.attempts.length - 1;
      return () => this.run(made, which, view, controller.signal);
    });
    const within = view.element.contains(document.activeElement); // the button that was pressed is gone while answers run
    view.refresh();
    if (within) view.lanes[0].body.focus({ preventScroll: true });
    this.toEnd();
    await Promise.all(runs.map((run) => run()));
    this.running = null;
    document.documentElement.classList.remove("answering");
    view.refresh();
    this.grown();
    this.store();
    const shown = turn.lanes.map(shownAttempt);
    this.announcer.finish(shown.map((each) => (each.error ? `${each.model}: ${each.error.message}` : `${each.model} answered in ${plural(each.pieces.length, "part")}.`)).join(" "));
    if (shown.some((each) => each.error?.kind === "token")) this.giveToken();
  }

  async giveToken() {
    if (await this.askToken()) {
      if (await this.connect()) this.retry();
    }
  }

  request(made, lane) {
    const { messages, items } = this.conversation.messages(lane);
    made.items = items;
    const { settings } = made;
    const body = {
      model: made.model,
      messages,
      max_tokens: settings.maxTokens,
      temperature: settings.temperature,
      seed: settings.seed,
      stream: true,
      stream_options: { include_usage: true },
    };
    if (settings.inside) Object.assign(body, { logprobs: true, top_logprobs: OTHERS });
    const own = {};
    const highlight = this.conversation.highlighted(messages, items);
    settings.highlight = highlight !== null;
    if (highlight) own.highlight = { ...highlight, strength: Math.log(settings.strength), guidance: settings.guidance };
    const seen = items.some(([turn, which]) => this.conversation.turns[turn].media[which].type === "image");
    if (settings.budget !== null && seen) own.image_tokens = settings.budget;
    if (settings.inside && items.length) own.attention = true;
    if (Object.keys(own).length) body.alula = own;
    return body;
  }

  async run(made, lane, view, signal) {
    const started = performance.now();
    const gather = new Gathered();
    const first = lane === 0;
    try {
      for await (const event of stream("v1/chat/completions", this.request(made, lane), signal)) {
        const choice = event.choices?.[0];
        const piece = gather.take(choice, event.alula ?? choice?.alula);
        if (made.status === "waiting") {
          made.status = "running";
          view.lanes[lane].status();
        }
        if (piece) {
          made.text += piece.text;
          made.pieces.push(made.told ? piece : { text: piece.text });
          made.elapsed = (performance.now() - started) / 1000;
          view.lanes[lane].grow(piece, made.pieces.length - 1);
          if (first) this.announcer.grow(piece.text);
        }
        if (choice?.finish_reason) made.finish = choice.finish_reason;
        if (event.usage) made.usage = event.usage;
        const report = event.alula?.computed_by ? event.alula : choice?.alula?.computed_by ? choice.alula : null;
        if (report) made.report = report;
      }
      made.status = "done";
      this.connected();
    } catch (error) {
      if (error.name === "AbortError" || signal.aborted) made.status = "stopped";
      else {
        made.status = "failed";
        made.error = inWords(error); // it is said where the answer was to stand, a lost connection too
      }
    }
    made.elapsed = (performance.now() - started) / 1000;
    view.lanes[lane].refresh();
  }

  changed(name, other) {
    if (name === "budget") this.preview();
    if (name === "inside" || name === "tint") return;
    if (other && this.settings.values.again) {
      if (this.running) this.stop();
      this.askedAgain ??= debounced(150, async () => {
        while (this.running) await new Promise((resolve) => setTimeout(resolve, 50));
        this.retry();
      });
      this.askedAgain();
    }
  }

  // ---- showing

  show(turn) {
    this.views.at(-1)?.setLast(false);
    const view = new TurnView(turn, this.views.length + 1, {
      inspect: (lane, shown, index) => this.inspect(lane, shown, index),
      inspected: () => (this.inspector.attempt ? this.inspectedLane : null),
      retry: () => this.retry(),
      edit: () => this.edit(),
      token: () => this.giveToken(),
      say: (text) => this.announcer.say(text),
      grown: () => this.grown(),
    });
    view.setLast(true);
    this.views.push(view);
    this.thread.append(view.element);
    this.showEmpty();
  }

  inspect(lane, shown, index) {
    if (this.inspectedLane && this.inspectedLane !== lane) this.inspectedLane.unpoint();
    this.inspectedLane = lane;
    if (lane.pinned) this.openPanel();
    this.inspector.show(shown, index, (which, item) => {
      const [turn, medium] = which.items[item] ?? [];
      return this.conversation.turns[turn]?.media[medium] ?? null;
    });
  }

  showEmpty() {
    const place = byId("empty");
    const empty = !this.conversation.turns.length && !this.editing;
    place.hidden = !empty;
    byId("new").disabled = empty;
    if (!empty) return;
    const samples = byId("samples");
    const fits = (sample) => sample.media.every((each) => this.takes()?.includes(each.type) ?? true);
    const shown = (this.samples ?? []).filter(fits).sort((a, b) => b.media.length - a.media.length).slice(0, SAMPLES);
    byId("samples-place").hidden = !shown.length;
    samples.replaceChildren(
      ...shown.map((sample) =>
        h(
          "li",
          {},
          h(
            "button",
            { type: "button", class: "sample", on: { click: async () => (await this.composer.fill(sample), this.composer.send()) } },
            sample.media.filter((each) => each.type === "image").map((each) => h("img", { src: each.url, alt: "" })),
            h("span", {}, sample.text),
          ),
        ),
      ),
    );
    byId("served").replaceChildren(
      ...this.models.map((each) =>
        h(
          "li",
          {},
          h("strong", {}, each.name),
          h("span", {}, ` ${inProse(each)}`),
        ),
      ),
    );
  }

  /** Follow an answer down, unless its reader has gone up. */
  grown() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.atEnd();
  }

  atEnd() {
    const left = this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight;
    this.following = left < 48;
    byId("latest").hidden = this.following;
  }

  toEnd() {
    this.following = true;
    this.scroller.scrollTop = this.scroller.scrollHeight;
    byId("latest").hidden = true;
  }

  // ---- keeping

  clear() {
    this.stop();
    this.replace(new Conversation());
    this.composer.draft.focus();
  }

  replace(conversation) {
    for (const view of this.views) view.forget();
    this.views = [];
    this.editing = null;
    this.thread.replaceChildren();
    this.inspector.clear();
    this.conversation = conversation;
    byId("system").value = conversation.system;
    for (const turn of conversation.turns) this.show(turn);
    this.showEmpty();
    this.toEnd();
    this.store();
    this.preview();
  }

  save() {
    const blob = new Blob([JSON.stringify(this.conversation.saved(), null, 1)], { type: "application/json" });
    const url = URL.createObjectURL(blob);
    const link = h("a", { href: url, download: `alula-conversation-${new Date().toISOString().slice(0, 16).replaceAll(":", "")}.json` });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  async restore(file) {
    try {
      let given;
      try {
        given = JSON.parse(await file.text());
      } catch {
        throw new Error(`${file.name} is no JSON.`);
      }
      const conversation = Conversation.restored(given);
      this.stop();
      this.replace(conversation);
      this.announcer.say(`Opened a conversation of ${plural(conversation.turns.length, "question")}.`);
    } catch (error) {
      this.composer.say(error.message);
    }
  }

  /** The tab remembers its conversation until it is closed; with what it weighs too much, without where tokens looked. */
  store() {
    const saved = this.conversation.saved();
    const bare = () => {
      for (const turn of saved.turns) for (const lane of turn.lanes) for (const each of lane.attempts) for (const piece of each.pieces) piece.attention = [];
      return saved;
    };
    for (const make of [() => saved, bare]) {
      try {
        sessionStorage.setItem(STORED, JSON.stringify(make()));
        return;
      } catch {
        // too large, or forbidden
      }
    }
    try {
      sessionStorage.removeItem(STORED);
    } catch {
      // then nothing was kept
    }
  }

  recall() {
    this.setComparing(comparedBefore());
    try {
      this.replace(Conversation.restored(JSON.parse(sessionStorage.getItem(STORED))));
    } catch {
      this.showEmpty();
    }
  }
}

/** Deltas become pieces: a token each where the server tells tokens apart, with what it told of them. */
class Gathered {
  constructor() {
    this.tokens = [];
    this.seen = [];
  }

  take(choice, own) {
    for (const token of choice?.logprobs?.content ?? []) {
      const top = (token.top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob }));
      this.tokens.push({ text: token.token, logprob: token.logprob ?? null, top });
    }
    this.seen.push(...(own?.attention ?? []));
    const text = choice?.delta?.content;
    if (!text) return null; // half of a character, whose other half is to come
    const piece = { text, tokens: this.tokens, attention: mean(this.seen) };
    this.tokens = [];
    this.seen = [];
    return piece;
  }
}

/** The attention of a piece of several tokens: their mean, picture by picture. */
function mean(seen) {
  if (!seen.length) return [];
  return seen[0].map((first, i) => {
    const all = seen.map((each) => each[i]).filter(Boolean);
    const average = (read) => all.reduce((sum, each) => sum + read(each), 0) / all.length;
    const weights = first.weights.map((value, cell) => (value === null ? null : average((each) => each.weights[cell])));
    return { item: first.item, grid: first.grid, box: first.box ?? null, weights, share: average((each) => each.share) };
  });
}

function inWords(error) {
  if (error instanceof ServerError) {
    const wait = error.wait ? ` It asks for ${plural(Math.ceil(error.wait), "second")} of patience.` : "";
    return { message: error.message, remedy: `${error.remedy}${wait}`.trim() || (error.kind === "busy" ? "Try again in a moment." : ""), kind: error.kind };
  }
  return { message: `The page stumbled over the server's answer: ${error.message}`, remedy: "Reload the page; if it happens again, tell the authors of alula.", kind: "refused" };
}

function inProse({ takes = [], base, exact_gate: exact, context }) {
  const words = [takes.length ? `takes text, ${takes.map((word) => ({ image: "pictures", audio: "sounds" })[word] ?? word).join(", ")}` : "takes text"];
  if (base) words.push(`an adapter over ${base}`);
  if (exact) words.push("without a picture, the base's own bits");
  if (context) words.push(`reads ${plural(context, "token")}`);
  return words.join("; ");
}

function chosenBefore() {
  try {
    return JSON.parse(sessionStorage.getItem(CHOSEN)).names;
  } catch {
    return null;
  }
}

function comparedBefore() {
  try {
    return JSON.parse(sessionStorage.getItem(CHOSEN)).comparing === true;
  } catch {
    return false;
  }
}
