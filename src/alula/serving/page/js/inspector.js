// One token of an answer: how sure it was, what else might have stood there, and where in the pictures it looked.

import { byId, h } from "./dom.js";
import { percent, plural } from "./numbers.js";

const WIDEST = 640; // px of the canvas
const HEAT = [255, 176, 32]; // amber over a grey picture: told from it by hue and by lightness

export class Inspector {
  constructor() {
    this.place = byId("inspector");
    this.canvas = byId("heat");
    this.scale = "token"; // or "answer": one scale for all of its tokens, so that they can be compared
    this.item = 0;
    this.picture = null;
    for (const input of document.querySelectorAll("input[name=scale]")) {
      input.addEventListener("change", () => {
        this.scale = input.value;
        this.draw();
      });
    }
    this.canvas.addEventListener("pointermove", (event) => this.readCell(event));
    this.canvas.addEventListener("pointerleave", () => this.cell(null));
    byId("inspector-close").addEventListener("click", () => this.clear());
  }

  clear() {
    this.attempt = null;
    this.place.classList.remove("full");
    byId("inspector-empty").hidden = false;
    byId("inspector-body").hidden = true;
    this.closed?.();
  }

  /** `index`: a piece of the answer, or null for the mean over all of them. `mediumOf` finds the picture of an item. */
  async show(attempt, index, mediumOf) {
    this.place.classList.add("full");
    byId("inspector-empty").hidden = true;
    byId("inspector-body").hidden = false;
    const same = this.attempt === attempt;
    Object.assign(this, { attempt, index, mediumOf });
    const piece = attempt.pieces[index];
    byId("token-text").textContent = visible(piece.text);
    byId("token-place").textContent = `token ${index + 1} of ${attempt.pieces.length}, ${attempt.model}`;
    this.alternatives(piece);
    const seen = piece.attention ?? [];
    byId("looked").hidden = !seen.length;
    byId("looked-not").hidden = seen.length > 0;
    byId("looked-not").textContent = attempt.items.length
      ? "Where this token looked was not recorded."
      : "There is no picture or sound in this conversation to look at.";
    if (!seen.length) return;
    if (!same || this.item >= seen.length) this.item = seen.reduce((best, each, i) => (each.share > seen[best].share ? i : best), 0);
    this.choices(seen);
    await this.load();
  }

  /** Which of several pictures is shown. */
  choices(seen) {
    const place = byId("looked-items");
    place.hidden = seen.length < 2;
    place.replaceChildren(
      ...seen.map((each, i) =>
        h("button", { type: "button", class: "chip", "aria-pressed": String(i === this.item), on: { click: () => ((this.item = i), this.choices(seen), this.load()) } },
          `${this.noun(each)} ${each.item + 1}: ${percent(each.share)}`),
      ),
    );
  }

  /** What an item is called. */
  noun(seen) {
    return this.mediumOf(this.attempt, seen.item)?.type === "audio" ? "sound" : "picture";
  }

  async load() {
    const seen = this.attempt.pieces[this.index].attention[this.item];
    const medium = this.mediumOf(this.attempt, seen.item);
    this.canvas.hidden = medium?.type !== "image";
    if (this.canvas.hidden) {
      this.cells = null;
      this.legend(seen, this.top());
      return;
    }
    if (this.picture?.source !== medium.url) {
      const picture = new Image();
      picture.src = medium.url;
      picture.source = medium.url;
      await picture.decode();
      this.picture = picture;
    }
    this.draw();
  }

  /** The largest weight that the colours reach: of this token, or of all tokens of the answer. */
  top() {
    const largest = (each) => (each ? each.weights.reduce((best, value) => Math.max(best, value ?? 0), 0) : 0);
    if (this.scale === "token") return largest(this.attempt.pieces[this.index].attention[this.item]);
    return this.attempt.pieces.reduce((best, piece) => Math.max(best, largest(piece.attention?.[this.item])), 0);
  }

  draw() {
    const seen = this.attempt?.pieces[this.index]?.attention?.[this.item];
    if (!seen || !this.picture) return;
    const { canvas, picture } = this;
    const ratio = Math.min(1, WIDEST / picture.naturalWidth) * Math.max(1, Math.min(WIDEST / picture.naturalWidth, WIDEST / 2 / picture.naturalHeight));
    canvas.width = Math.max(1, Math.round(picture.naturalWidth * ratio));
    canvas.height = Math.max(1, Math.round(picture.naturalHeight * ratio));
    const pen = canvas.getContext("2d");
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = "saturation";
    pen.fillStyle = "#777";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = "source-over";
    pen.fillStyle = "rgb(12 16 20 / 68%)";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    const top = this.top();
    this.cells = null;
    if (seen.grid) this.heat(pen, seen, top);
    this.legend(seen, top);
  }

  heat(pen, seen, top) {
    const [rows, columns] = seen.grid;
    const [left, upper, right, lower] = seen.box ?? [0, 0, this.picture.naturalWidth, this.picture.naturalHeight];
    const [sx, sy] = [this.canvas.width / this.picture.naturalWidth, this.canvas.height / this.picture.naturalHeight];
    const [width, height] = [((right - left) * sx) / columns, ((lower - upper) * sy) / rows];
    this.cells = { rows, columns, left: left * sx, upper: upper * sy, width, height, weights: seen.weights };
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const weight = seen.weights[row * columns + column];
        const [x, y] = [Math.round(left * sx + column * width), Math.round(upper * sy + row * height)];
        const [w, h2] = [Math.round(left * sx + (column + 1) * width) - x, Math.round(upper * sy + (row + 1) * height) - y];
        if (weight === null) {
          pen.fillStyle = "rgb(0 0 0 / 55%)"; // not kept: there was nothing to look at
          pen.fillRect(x, y, w, h2);
          pen.strokeStyle = "rgb(255 255 255 / 28%)";
          pen.beginPath();
          pen.moveTo(x + w * 0.3, y + h2 * 0.7);
          pen.lineTo(x + w * 0.7, y + h2 * 0.3);
          pen.stroke();
        } else {
          pen.fillStyle = heat(top ? weight / top : 0);
          pen.fillRect(x, y, w, h2);
        }
      }
    }
  }

  legend(seen, top) {
    const ramp = byId("ramp");
    const pen = ramp.getContext("2d");
    pen.clearRect(0, 0, ramp.width, ramp.height);
    pen.fillStyle = "#2c3237";
    pen.fillRect(0, 0, ramp.width, ramp.height);
    for (let x = 0; x < ramp.width; x += 1) {
      pen.fillStyle = heat(x / (ramp.width - 1));
      pen.fillRect(x, 0, 1, ramp.height);
    }
    const kept = seen.weights.filter((weight) => weight !== null).length;
    byId("ramp-top").textContent = percent(top);
    byId("ramp-middle").textContent = percent(top / 2);
    const even = kept ? `; spread evenly, each would have ${percent(seen.share / kept)}` : "";
    const dropped = kept < seen.weights.length ? `. ${plural(seen.weights.length - kept, "token")} (crossed out) were not kept` : "";
    byId("looked-words").textContent = `${percent(seen.share)} of its attention went to the ${this.noun(seen)}'s ${plural(kept, "token")}${even}${dropped}.`;
    const lost = seen.item < 0 ? "Which medium these tokens are of is not known." : "";
    byId("looked-where").textContent =
      lost || (this.canvas.hidden || seen.grid ? "" : "The tokens of this picture are no grid, so they have no place on it.");
    const best = this.cells ? ranked(seen.weights).slice(0, 3).map((at) => this.cellWords(at)) : [];
    this.canvas.setAttribute("aria-label", best.length ? `Most attention: ${best.join("; ")}` : "The picture");
    this.cell(null);
  }

  cellWords(at) {
    const { columns, weights } = this.cells;
    return `row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}: ${weights[at] === null ? "not kept" : percent(weights[at])}`;
  }

  readCell(event) {
    if (!this.cells) return;
    const frame = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * this.canvas.width;
    const y = ((event.clientY - frame.top) / frame.height) * this.canvas.height;
    const column = Math.floor((x - this.cells.left) / this.cells.width);
    const row = Math.floor((y - this.cells.upper) / this.cells.height);
    const inside = column >= 0 && row >= 0 && column < this.cells.columns && row < this.cells.rows;
    this.cell(inside ? row * this.cells.columns + column : null);
  }

  cell(at) {
    byId("cell").textContent = at === null ? "" : this.cellWords(at);
  }

  alternatives(piece) {
    const rows = [];
    for (const token of piece.tokens ?? []) {
      if (token.logprob === null) continue;
      const others = (token.top ?? []).filter((other) => other.text !== token.text);
      rows.push(bar(token.text, token.logprob, true), ...others.map((other) => bar(other.text, other.logprob, false)));
    }
    byId("alternatives").replaceChildren(...rows);
    byId("alternatives-title").hidden = !rows.length;
  }
}

function bar(text, logprob, taken) {
  const probability = Math.exp(logprob);
  const meter = h("span", { class: "meter" }, h("span", { class: "fill" }));
  meter.firstChild.style.width = `${Math.max(0.5, 100 * probability)}%`;
  return h("li", { class: taken ? "taken" : null }, h("code", {}, visible(text)), meter, h("span", { class: "number" }, percent(probability)));
}

const heat = (share) => `rgb(${HEAT.join(" ")} / ${(0.94 * Math.max(0, Math.min(1, share))).toFixed(3)})`;

const ranked = (weights) => [...weights.keys()].filter((at) => weights[at] !== null).sort((a, b) => weights[b] - weights[a]);

/** A token with its blanks where they can be seen. */
export const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→") || "(nothing)";
