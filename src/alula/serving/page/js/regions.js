// Boxes on a picture, by mouse, by finger or by keyboard.

import { button, byId, h } from "./dom.js";

const STEP = 0.02; // of the picture's side, per press of an arrow key

export class RegionEditor {
  constructor() {
    this.dialog = byId("regions");
    this.stage = byId("regions-stage");
    this.list = byId("regions-list");
    byId("regions-add").addEventListener("click", () => this.addCentred());
    byId("regions-clear").addEventListener("click", () => this.set([]));
    this.dialog.addEventListener("close", () => this.done?.());
    this.stage.addEventListener("pointerdown", (event) => this.draw(event));
    this.stage.addEventListener("keydown", (event) => this.nudge(event));
  }

  /** Show a picture; `done` is called with nothing once the boxes in `medium.regions` are as they shall be. */
  open(medium, done) {
    this.medium = medium;
    this.done = done;
    this.picture = h("img", { src: medium.url, alt: medium.name, draggable: "false" });
    this.stage.replaceChildren(this.picture);
    this.set(medium.regions);
    this.dialog.showModal();
  }

  set(boxes, focus = -1) {
    this.medium.regions = boxes;
    for (const old of this.stage.querySelectorAll(".box")) old.remove();
    const { width, height } = this.medium;
    boxes.forEach((box, index) => {
      const element = h("div", {
        class: "box",
        tabindex: "0",
        role: "button",
        data: { index },
        "aria-label": `Box ${index + 1}: ${words(box)}. Arrow keys move it, with Shift they resize it, Delete removes it`,
      });
      place(element, box, width, height);
      this.stage.append(element);
    });
    this.list.replaceChildren(
      ...boxes.map((box, index) =>
        h("li", {}, h("span", {}, words(box)), button({ label: `Remove box ${index + 1}`, symbol: "close", className: "quiet", on: () => this.set(boxes.filter((_, i) => i !== index)) })),
      ),
    );
    if (focus >= 0) this.stage.querySelector(`[data-index="${focus}"]`)?.focus();
  }

  addCentred() {
    const { width, height, regions } = this.medium;
    this.set([...regions, [width / 4, height / 4, (3 * width) / 4, (3 * height) / 4].map(Math.round)], regions.length);
  }

  /** The place of a pointer in pixels of the picture. */
  at(event) {
    const frame = this.picture.getBoundingClientRect();
    const within = (value, size) => Math.max(0, Math.min(size, value));
    return [
      within(((event.clientX - frame.left) / frame.width) * this.medium.width, this.medium.width),
      within(((event.clientY - frame.top) / frame.height) * this.medium.height, this.medium.height),
    ];
  }

  draw(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    const held = event.target.closest(".box");
    const from = this.at(event);
    const before = this.medium.regions;
    const index = held ? Number(held.dataset.index) : before.length;
    this.stage.setPointerCapture(event.pointerId);
    let moved = false;
    const move = (now) => {
      const to = this.at(now);
      const box = held
        ? shifted(before[index], to[0] - from[0], to[1] - from[1], this.medium)
        : [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])].map(Math.round);
      moved ||= Math.hypot(to[0] - from[0], to[1] - from[1]) > 0.01 * Math.max(this.medium.width, this.medium.height);
      if (moved && box[2] > box[0] && box[3] > box[1]) this.set(held ? before.with(index, box) : [...before, box]);
    };
    const up = () => {
      this.stage.removeEventListener("pointermove", move);
      this.stage.removeEventListener("pointerup", up);
      this.stage.removeEventListener("pointercancel", up);
      this.stage.querySelector(`[data-index="${index}"]`)?.focus({ preventScroll: true });
    };
    this.stage.addEventListener("pointermove", move);
    this.stage.addEventListener("pointerup", up);
    this.stage.addEventListener("pointercancel", up);
  }

  nudge(event) {
    const held = event.target.closest(".box");
    if (!held) return;
    const index = Number(held.dataset.index);
    const boxes = this.medium.regions;
    if (event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      this.set(boxes.filter((_, i) => i !== index), Math.max(0, index - 1));
      return;
    }
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!direction) return;
    event.preventDefault();
    const { width, height } = this.medium;
    const [dx, dy] = [direction[0] * Math.max(1, STEP * width), direction[1] * Math.max(1, STEP * height)];
    const [left, top, right, bottom] = boxes[index];
    const box = event.shiftKey
      ? [left, top, Math.min(width, Math.max(left + 1, right + dx)), Math.min(height, Math.max(top + 1, bottom + dy))].map(Math.round)
      : shifted(boxes[index], dx, dy, this.medium);
    this.set(boxes.with(index, box), index);
  }
}

function shifted([left, top, right, bottom], dx, dy, { width, height }) {
  const x = Math.round(Math.max(-left, Math.min(width - right, dx)));
  const y = Math.round(Math.max(-top, Math.min(height - bottom, dy)));
  return [left + x, top + y, right + x, bottom + y];
}

const words = ([left, top, right, bottom]) => `${left}, ${top} to ${right}, ${bottom} px`;

/** Lay an element over a picture's parent, in shares of the picture. Set one by one: the policy allows no style texts. */
export function place(element, [left, top, right, bottom], width, height) {
  element.style.left = `${(100 * left) / width}%`;
  element.style.top = `${(100 * top) / height}%`;
  element.style.width = `${(100 * (right - left)) / width}%`;
  element.style.height = `${(100 * (bottom - top)) / height}%`;
}

/** A picture with its boxes, for showing. */
export function framed(medium) {
  const frame = h("span", { class: "framed" }, h("img", { src: medium.url, alt: medium.name }));
  for (const box of medium.regions ?? []) {
    const element = h("span", { class: "box shown" });
    place(element, box, medium.width, medium.height);
    frame.append(element);
  }
  return frame;
}
