// What screen readers are told of an answer that grows: whole sentences, no oftener than they can be read.

import { byId } from "./dom.js";

const EVERY = 1500;

export class Announcer {
  constructor() {
    this.place = byId("announcements");
    this.rest = "";
    this.queue = [];
    this.timer = null;
  }

  /** Say one thing soon. */
  say(text) {
    this.queue.push(text);
    this.timer ??= setTimeout(() => this.speak(), 50);
  }

  /** Text of a growing answer: said once its sentence is whole. */
  grow(text) {
    this.rest += text;
    const end = Math.max(this.rest.lastIndexOf(". "), this.rest.lastIndexOf("! "), this.rest.lastIndexOf("? "), this.rest.lastIndexOf("\n"));
    if (end < 0 && this.rest.length < 400) return;
    const cut = end < 0 ? this.rest.length : end + 1;
    this.say(this.rest.slice(0, cut));
    this.rest = this.rest.slice(cut);
  }

  finish(text) {
    if (this.rest.trim()) this.say(this.rest);
    this.rest = "";
    this.say(text);
  }

  speak() {
    this.place.textContent = this.queue.splice(0).join(" ");
    this.timer = setTimeout(() => {
      this.timer = null;
      if (this.queue.length) this.speak();
    }, EVERY);
  }
}
