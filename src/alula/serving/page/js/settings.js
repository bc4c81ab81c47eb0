// How answers are made: the sliders, what they stand at, and what they will do.

import { byId } from "./dom.js";
import { percent, plural, whole } from "./numbers.js";

const STORED = "alula.settings";
const LENGTHS = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768];
const STARTING = {
  budget: null, // image tokens kept of each picture; null: all
  maxTokens: 256,
  temperature: 0,
  seed: 0,
  strength: 2, // times: what attention to highlighted tokens is multiplied by; the server takes its logarithm
  guidance: 1.3,
  inside: true, // record each token: how sure, what else, where it looked
  tint: false,
  again: false, // ask the last question again when a slider was moved
};

export class Settings {
  constructor() {
    this.values = { ...STARTING, ...stored() };
    this.most = 256; // image tokens of a picture, as far as is known
    this.known = false;
    this.changed = () => {}; // (name, whether an answer would be another)
    this.budget = byId("budget");
    this.length = byId("length");
    this.lengths = LENGTHS;
    this.bind(this.budget, "budget", () => (Number(this.budget.value) >= this.most ? null : Number(this.budget.value)));
    this.bind(this.length, "maxTokens", () => this.lengths[Number(this.length.value)]);
    for (const name of ["temperature", "strength", "guidance"]) {
      const input = byId(name);
      this.bind(input, name, () => (name === "strength" ? 2 ** Number(input.value) : Number(input.value)));
    }
    const seed = byId("seed");
    this.bind(seed, "seed", () => Math.max(0, Math.trunc(Number(seed.value)) || 0));
    for (const name of ["inside", "tint", "again"]) this.bind(byId(name), name, () => byId(name).checked);
    byId("settings-reset").addEventListener("click", () => {
      this.values = { ...STARTING };
      this.show();
      this.changed("", true);
    });
    this.show();
  }

  bind(input, name, read) {
    input.addEventListener("input", () => {
      this.values[name] = read();
      this.write();
    });
    input.addEventListener("change", () => this.changed(name, !["inside", "tint", "again"].includes(name)));
  }

  /** The most tokens that the server gives an answer. */
  longest(most) {
    this.lengths = [...LENGTHS.filter((length) => length < most), most];
    this.values.maxTokens = Math.min(this.values.maxTokens, most);
    this.show();
  }

  /** How many tokens a picture has, told by the server; null: unknown. */
  pictures(tokens) {
    this.known = tokens !== null;
    const most = tokens ?? this.most;
    if (most !== this.most) {
      this.most = most;
      if (this.values.budget !== null && this.values.budget >= most) this.values.budget = null;
    }
    this.show();
  }

  show() {
    const { values } = this;
    this.budget.max = this.most;
    this.budget.value = values.budget ?? this.most;
    this.length.max = this.lengths.length - 1;
    this.length.value = this.lengths.findLastIndex((length) => length <= values.maxTokens);
    byId("temperature").value = values.temperature;
    byId("strength").value = Math.log2(values.strength);
    byId("guidance").value = values.guidance;
    byId("seed").value = values.seed;
    for (const name of ["inside", "tint", "again"]) byId(name).checked = values[name];
    this.write();
  }

  /** Say in words what the sliders stand at. */
  write() {
    const { values } = this;
    const say = (id, text) => {
      byId(`${id}-value`).textContent = text;
      byId(id).setAttribute("aria-valuetext", text);
    };
    const all = this.known ? `all ${whole(this.most)}` : "all";
    say("budget", values.budget === null ? all : `${whole(values.budget)}${this.known ? ` of ${whole(this.most)}` : ""}`);
    say("length", plural(values.maxTokens, "token"));
    say("temperature", values.temperature === 0 ? "0, the likeliest token" : values.temperature.toFixed(2));
    say("strength", `× ${values.strength.toFixed(2)}`);
    say("guidance", values.guidance === 1 ? "1, off" : values.guidance.toFixed(1));
    byId("seed").disabled = values.temperature === 0;
    document.documentElement.classList.toggle("tint", values.tint);
    try {
      sessionStorage.setItem(STORED, JSON.stringify(values));
    } catch {
      // they last as long as the page then
    }
  }

  /** What the server will do with a prompt, or null for no word. */
  preview(told) {
    const place = byId("budget-effect");
    const images = told?.images ?? [];
    if (!images.length) {
      place.textContent = "Attach a picture to see how many tokens it has.";
      return;
    }
    const [kept, of] = [images.reduce((sum, each) => sum + each.kept, 0), images.reduce((sum, each) => sum + each.tokens, 0)];
    const share = of ? ` (${percent(kept / of)})` : "";
    const context = told.context ? ` of ${whole(told.context)}` : "";
    place.textContent = `${whole(kept)} of ${plural(of, "image token")} kept${share}. The prompt has ${whole(told.prompt_tokens)}${context} tokens.`;
  }
}

function stored() {
  try {
    const values = JSON.parse(sessionStorage.getItem(STORED)) ?? {};
    return Object.fromEntries(Object.entries(values).filter(([name, value]) => name in STARTING && (typeof value === typeof STARTING[name] || name === "budget")));
  } catch {
    return {};
  }
}
