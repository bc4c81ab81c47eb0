// The text of one answer, as it grows. Each piece is appended once and each line is formatted once, when it is whole,
// so that thousands of tokens cost what they weigh and not its square.

import { h } from "./dom.js";
import { block, inline } from "./markdown.js";

export class AnswerText {
  /** `told`: pieces are tokens that can be pointed at; without, text goes in as text. */
  constructor({ told }) {
    this.told = told;
    this.element = h("div", { class: "answer-text" });
    this.parent = this.element; // where the next block goes
    this.line = null; // {element, pieces, raw}: the line that is being written
    this.list = null;
    this.fence = null;
    this.paragraph = null;
    this.spans = []; // of piece i: the elements that show it
    this.current = -1;
  }

  /** Append a piece; `index` is its number among the answer's pieces, `level` how sure it was (0 to 4, 4 is surest). */
  push(text, index, level = null) {
    let from = 0;
    for (;;) {
      const end = text.indexOf("\n", from);
      const part = text.slice(from, end < 0 ? text.length : end);
      if (part) this.write(part, index, level);
      if (end < 0) return;
      this.close();
      from = end + 1;
    }
  }

  write(text, index, level) {
    this.line ??= this.open();
    this.line.pieces.push({ text, index, level });
    if (!this.fence && !this.line.element.firstChild) text = text.trimStart(); // tokens begin with blanks, lines do not
    if (!text) return;
    if (this.told) this.line.element.append(this.span(text, index, level));
    else if (this.line.element.lastChild?.nodeType === Node.TEXT_NODE) this.line.element.lastChild.appendData(text);
    else this.line.element.append(text);
  }

  span(text, index, level) {
    const span = h("span", { class: level === null ? "t" : `t p${level}`, data: { t: index } }, text);
    (this.spans[index] ??= []).push(span);
    return span;
  }

  open() {
    if (this.fence) {
      if (this.fence.lines++) this.fence.code.append("\n");
      const element = h("span");
      this.fence.code.append(element);
      return { element, pieces: [] };
    }
    const element = h("p", { class: "open" });
    this.element.append(element);
    return { element, pieces: [] };
  }

  /** The line is whole: give it its form. */
  close() {
    const line = this.line ?? { element: null, pieces: [] };
    this.line = null;
    const text = line.pieces.map((piece) => piece.text).join("");
    const kind = block(text);
    if (this.fence) {
      if (kind.kind === "fence" && text.trim().length <= this.fence.marker.length) {
        line.element.remove();
        this.forget(line);
        this.fence = null;
      } else if (!line.element && this.fence.lines++) this.fence.code.append("\n");
      return;
    }
    if (line.element) {
      line.element.remove();
      this.forget(line);
    }
    if (kind.kind !== "ul" && kind.kind !== "ol") this.list = null;
    if (kind.kind !== "p") this.paragraph = null;
    if (kind.kind === "blank") return;
    if (kind.kind === "hr") {
      this.element.append(h("hr"));
      return;
    }
    if (kind.kind === "fence") {
      const code = h("code");
      this.element.append(h("pre", { tabindex: "0" }, code));
      this.fence = { code, lines: 0, marker: text.trim().slice(0, 3) };
      return;
    }
    const target = this.block(kind);
    this.format(target, text, line.pieces, kind.from);
  }

  block(kind) {
    if (kind.kind === "p") {
      if (this.paragraph) this.paragraph.append("\n");
      else this.element.append((this.paragraph = h("p")));
      return this.paragraph;
    }
    if (kind.kind === "ul" || kind.kind === "ol") {
      if (this.list?.kind !== kind.kind) {
        const list = h(kind.kind, kind.kind === "ol" ? { start: kind.number } : {});
        this.element.append(list);
        this.list = { kind: kind.kind, element: list };
      }
      const item = h("li", { class: kind.depth ? `in${kind.depth}` : null });
      this.list.element.append(item);
      return item;
    }
    // headings of an answer stand below those of the page
    const tag = kind.kind === "blockquote" ? "blockquote" : `h${Math.min(6, Number(kind.kind[1]) + 2)}`;
    const element = h(tag);
    this.element.append(element);
    return element;
  }

  /** The spans of a line that is written anew are no longer shown. */
  forget(line) {
    for (const { index } of line.pieces) {
      if (this.spans[index]) this.spans[index] = this.spans[index].filter((span) => !line.element.contains(span));
    }
  }

  format(target, text, pieces, from) {
    const starts = [];
    let position = 0;
    for (const piece of pieces) {
      starts.push(position);
      position += piece.text.length;
    }
    let at = 0;
    const leaf = (start, stop) => {
      if (!this.told) return [document.createTextNode(text.slice(start, stop))];
      const made = [];
      while (at > 0 && starts[at] > start) at -= 1;
      while (at + 1 < pieces.length && starts[at + 1] <= start) at += 1;
      for (let i = at; i < pieces.length && starts[i] < stop; i += 1) {
        const part = text.slice(Math.max(start, starts[i]), Math.min(stop, starts[i] + pieces[i].text.length));
        if (part) made.push(this.span(part, pieces[i].index, pieces[i].level));
        at = i;
      }
      return made;
    };
    const write = (nodes) =>
      nodes.flatMap((node) => {
        if (!node.tag) return leaf(node.start, node.stop);
        if (node.tag !== "a") return [h(node.tag, {}, write(node.children))];
        const link = h("a", { href: node.href, rel: "noopener noreferrer", target: "_blank" }, write(node.children));
        return node.shown ? [link, h("span", { class: "address" }, ` (${node.href})`)] : [link];
      });
    target.append(...write(inline(text, from)));
  }

  end() {
    if (this.line) this.close();
  }

  /** Mark the piece that is looked at. */
  point(index) {
    for (const span of this.spans[this.current] ?? []) span.classList.remove("current");
    this.current = index;
    for (const span of this.spans[index] ?? []) span.classList.add("current");
    return this.spans[index]?.[0] ?? null;
  }
}

/** Of a finished answer: its text again, for an attempt that was restored. */
export function rendered(attempt) {
  const text = new AnswerText({ told: attempt.told });
  if (attempt.told) attempt.pieces.forEach((piece, index) => text.push(piece.text, index, certainty(piece)));
  else text.push(attempt.text, 0);
  text.end();
  return text;
}

/** How sure a piece was: 0 (under 20 %) to 4 (95 % and more), null where it is not known. */
export function certainty(piece) {
  if (!piece.tokens?.length || piece.tokens.some((token) => token.logprob === null)) return null;
  const p = Math.exp(Math.min(...piece.tokens.map((token) => token.logprob)));
  return p >= 0.95 ? 4 : p >= 0.8 ? 3 : p >= 0.5 ? 2 : p >= 0.2 ? 1 : 0;
}
