// What was asked and answered: turns, lanes (one or two models beside each other) and attempts at an answer.
// Nothing here knows of the page; it becomes requests, and a file and back.

const FORMAT = "alula.conversation";
const VERSION = 1;

/** A medium: {type: "image" | "audio", name, url (a data URI), width, height, seconds, regions: [[l, t, r, b]]}. */

export function attempt(model, settings) {
  return {
    model,
    settings,
    status: "waiting", // waiting, running, done, stopped or failed
    text: "",
    pieces: [], // {text, tokens: [{text, logprob, top}], attention: [{item, grid, weights, share, box}]}
    told: false, // pieces are tokens, with what is known of each
    items: [], // media of the whole request: [turn, medium]
    finish: null,
    usage: null,
    report: null, // computed_by, image_tokens, cached_tokens, seconds
    elapsed: null,
    error: null, // {message, remedy, kind}
  };
}

export class Conversation {
  constructor() {
    this.turns = []; // {text, media, marks: [[start, stop]], lanes: [{attempts, shown}]}
    this.system = "";
  }

  get last() {
    return this.turns.at(-1) ?? null;
  }

  add(question, lanes) {
    const turn = { ...question, lanes: Array.from({ length: lanes }, () => ({ attempts: [], shown: -1 })) };
    this.turns.push(turn);
    return turn;
  }

  /** Messages for lane `lane` of the last turn, and the media in them in order. Unanswered questions are left out. */
  messages(lane) {
    const messages = this.system.trim() ? [{ role: "system", content: this.system }] : [];
    const items = [];
    this.turns.forEach((turn, number) => {
      const said = number === this.turns.length - 1 ? null : answered(turn, lane);
      if (number < this.turns.length - 1 && said === null) return;
      turn.media.forEach((_, index) => items.push([number, index]));
      messages.push({ role: "user", content: content(turn) });
      if (said !== null) messages.push({ role: "assistant", content: said });
    });
    return { messages, items };
  }

  /** What the last question highlights, as the server takes it; null where it highlights nothing. */
  highlighted(messages, items) {
    const turn = this.last;
    const images = items.filter(([number, which]) => this.turns[number].media[which].type === "image"); // regions count these alone
    const message = messages.length - 1;
    const spans = turn.marks.map(([start, stop]) => {
      const text = turn.text.slice(start, stop);
      return { text, message, index: occurrence(turn.text, text, start) };
    });
    const regions = turn.media.flatMap((medium, index) => {
      const item = images.findIndex(([number, which]) => number === this.turns.length - 1 && which === index);
      return (medium.regions ?? []).map((box) => ({ item, box }));
    });
    return spans.length + regions.length ? { spans, regions } : null;
  }

  saved() {
    return {
      format: FORMAT,
      version: VERSION,
      saved: new Date().toISOString(),
      system: this.system,
      turns: this.turns.map((turn) => ({
        text: turn.text,
        media: turn.media,
        marks: turn.marks,
        lanes: turn.lanes.map((lane) => ({
          shown: lane.shown,
          attempts: lane.attempts.map((each) => ({
            ...each,
            pieces: each.told ? each.pieces.map(lean) : [],
            status: ["waiting", "running"].includes(each.status) ? "stopped" : each.status,
          })),
        })),
      })),
    };
  }

  /** @throws {Error} what is wrong with the file, in words */
  static restored(given) {
    if (given?.format !== FORMAT) throw new Error("This file is no conversation saved by this page.");
    if (given.version !== VERSION) throw new Error(`This conversation is of version ${given.version}; this page reads version ${VERSION}.`);
    const wrong = (where) => new Error(`This conversation is damaged: ${where} is not what it has to be.`);
    const check = (good, where) => {
      if (!good) throw wrong(where);
    };
    const conversation = new Conversation();
    conversation.system = String(given.system ?? "");
    check(Array.isArray(given.turns), "turns");
    conversation.turns = given.turns.map((turn, t) => {
      const at = `turn ${t + 1}`;
      check(typeof turn?.text === "string" && Array.isArray(turn.media) && Array.isArray(turn.lanes) && turn.lanes.length > 0, at);
      const media = turn.media.map((medium) => {
        check(medium?.type === "image" || medium?.type === "audio", `${at}, a medium`);
        // nothing is ever loaded from elsewhere: a file from a stranger must not make the browser call out
        check(typeof medium.url === "string" && medium.url.startsWith(`data:${medium.type}/`), `${at}, the address of ${medium.name}`);
        const regions = (medium.regions ?? []).map((box) => box.map(Number));
        check(regions.every((box) => box.length === 4 && box.every(Number.isFinite)), `${at}, a region`);
        const { type, url } = medium;
        const [width, height, seconds] = [medium.width, medium.height, medium.seconds].map((value) => number(value) ?? 0);
        return { type, url, name: String(medium.name ?? type), width, height, seconds, regions };
      });
      const marks = (turn.marks ?? []).map((mark) => mark.map(Number));
      check(marks.every(([start, stop]) => 0 <= start && start < stop && stop <= turn.text.length), `${at}, a mark`);
      const lanes = turn.lanes.map((lane) => {
        check(Array.isArray(lane?.attempts), `${at}, an answer`);
        const attempts = lane.attempts.map((each) => {
          check(typeof each?.text === "string" && Array.isArray(each.pieces), `${at}, an answer`);
          const pieces = each.pieces.map((piece) => {
            check(typeof piece?.text === "string", `${at}, a token`);
            return { text: piece.text, tokens: (piece.tokens ?? []).map(readToken), attention: (piece.attention ?? []).map(readLook) };
          });
          return readAttempt(each, pieces);
        });
        return { attempts, shown: Math.min(attempts.length - 1, Math.max(0, Number(lane.shown) || 0)) };
      });
      return { text: turn.text, media, marks, lanes };
    });
    return conversation;
  }
}

/** A number that is one, or null. */
const number = (value) => (Number.isFinite(value) ? value : null);

const readToken = (token) => ({
  text: String(token?.text ?? ""),
  logprob: number(token?.logprob),
  top: (token?.top ?? []).map((other) => ({ text: String(other?.text ?? ""), logprob: number(other?.logprob) ?? -Infinity })),
});

function readLook(look) {
  const weights = (look?.weights ?? []).map(number);
  const grid = Array.isArray(look?.grid) && look.grid[0] * look.grid[1] === weights.length ? look.grid.map(Number) : null;
  const box = Array.isArray(look?.box) && look.box.length === 4 && look.box.every(Number.isFinite) ? look.box : null;
  return { item: number(look?.item) ?? -1, grid, weights, share: number(look?.share) ?? 0, box };
}

/** An attempt out of a file: what it tells of numbers are numbers, or is left out. */
function readAttempt(each, pieces) {
  const numbers = (given, names) => {
    const found = Object.fromEntries(names.map((name) => [name, number(given?.[name])]));
    return Object.values(found).includes(null) ? null : found;
  };
  const made = attempt(String(each.model), {
    budget: number(each.settings?.budget),
    temperature: number(each.settings?.temperature) ?? 0,
    seed: number(each.settings?.seed) ?? 0,
    strength: number(each.settings?.strength) ?? 1,
    guidance: number(each.settings?.guidance) ?? 1,
    highlight: each.settings?.highlight === true,
  });
  const report = each.report && {
    computed_by: String(each.report.computed_by),
    image_tokens: numbers(each.report.image_tokens, ["kept", "of"]),
    cached_tokens: number(each.report.cached_tokens) ?? 0,
    seconds: numbers(each.report.seconds, ["queued", "prefill", "first_token", "total"]),
  };
  return Object.assign(made, {
    status: ["done", "stopped", "failed"].includes(each.status) ? each.status : "stopped",
    text: each.text,
    pieces,
    told: Boolean(each.told && pieces.length),
    items: (each.items ?? []).filter((item) => Array.isArray(item) && item.every(Number.isInteger)),
    finish: typeof each.finish === "string" ? each.finish : null,
    usage: numbers(each.usage, ["completion_tokens"]),
    report: report || null,
    elapsed: number(each.elapsed),
    error: each.error ? { message: String(each.error.message), remedy: String(each.error.remedy ?? ""), kind: "refused" } : null,
  });
}

export const shownAttempt = (lane) => lane?.attempts[lane.shown] ?? null;

function answered(turn, lane) {
  const shown = shownAttempt(turn.lanes[lane] ?? turn.lanes[0]);
  return shown && shown.text.trim() ? shown.text : null;
}

function content(turn) {
  if (!turn.media.length) return turn.text;
  const media = turn.media.map((medium) =>
    medium.type === "image"
      ? { type: "image_url", image_url: { url: medium.url } }
      : { type: "input_audio", input_audio: { data: medium.url.slice(medium.url.indexOf(",") + 1), format: "wav" } },
  );
  return [...media, { type: "text", text: turn.text }];
}

/** Which occurrence of `text`, counted from 0 and apart as the server counts, begins at `start`. */
function occurrence(whole, text, start) {
  let count = 0;
  for (let at = whole.indexOf(text); at >= 0 && at < start; at = whole.indexOf(text, at + text.length)) count += 1;
  return count;
}

/** Numbers of attention with the digits that can be told apart. */
function lean(piece) {
  const short = (value) => (value === null ? null : Number(value.toPrecision(3)));
  return { ...piece, attention: piece.attention.map((each) => ({ ...each, weights: Array.from(each.weights, short), share: short(each.share) })) };
}
