// A small, safe subset of Markdown: made of nodes, never of markup, so that HTML in an answer stays the text it is.
//
// A line is parsed once, when it is whole. What comes out are spans of the line's characters under the elements they
// stand in; whoever writes them may cut them further, at the borders of tokens.

const LONGEST = 20000; // of a line with formatting
const DEEPEST = 4;

/** What kind of block a line is, and where its content begins. */
export function block(line) {
  let found = /^(#{1,6}) +/.exec(line);
  if (found) return { kind: `h${found[1].length}`, from: found[0].length };
  found = /^( {0,12})[-*+] +/.exec(line);
  if (found) return { kind: "ul", from: found[0].length, depth: Math.min(3, Math.floor(found[1].length / 2)) };
  found = /^( {0,12})(\d{1,9})[.)] +/.exec(line);
  if (found) return { kind: "ol", from: found[0].length, depth: Math.min(3, Math.floor(found[1].length / 2)), number: Number(found[2]) };
  found = /^> ?/.exec(line);
  if (found) return { kind: "blockquote", from: found[0].length };
  if (/^ {0,3}(```|~~~)/.test(line)) return { kind: "fence", from: line.length };
  if (/^ {0,3}([-*_] *){3,}$/.test(line)) return { kind: "hr", from: line.length };
  if (!line.trim()) return { kind: "blank", from: line.length };
  return { kind: "p", from: line.length - line.trimStart().length };
}

/** Nodes of a line from `start` to `stop`: {start, stop} of plain text, or {tag, href, children}. */
export function inline(line, start = 0, stop = line.length, depth = 0) {
  if (line.length > LONGEST || depth > DEEPEST) return [{ start, stop }];
  const nodes = [];
  const missing = new Set(); // markers that have no end in what is left: they are not searched again
  let plain = start;
  let at = start;
  const take = (node, next) => {
    if (at > plain) nodes.push({ start: plain, stop: at });
    nodes.push(node);
    at = plain = next;
  };
  const closing = (marker, from) => {
    if (missing.has(marker)) return -1;
    const found = line.indexOf(marker, from);
    if (found >= 0 && found + marker.length <= stop) return found;
    missing.add(marker);
    return -1;
  };
  while (at < stop) {
    const character = line[at];
    if (character === "`") {
      let ticks = 1;
      while (ticks < 3 && line[at + ticks] === "`") ticks += 1;
      const end = closing("`".repeat(ticks), at + ticks);
      if (end > at + ticks) {
        take({ tag: "code", children: [{ start: at + ticks, stop: end }] }, end + ticks);
        continue;
      }
      at += ticks;
      continue;
    }
    if (character === "*" || character === "_") {
      const marker = line[at + 1] === character ? character.repeat(2) : character;
      const inWord = character === "_" && /[\p{L}\p{N}]/u.test(line[at - 1] ?? "");
      const from = at + marker.length;
      if (!inWord && from < stop && !/\s/.test(line[from])) {
        const end = closing(marker, from);
        if (end > from && !/\s/.test(line[end - 1])) {
          take({ tag: marker.length === 2 ? "strong" : "em", children: inline(line, from, end, depth + 1) }, end + marker.length);
          continue;
        }
      }
      at += marker.length;
      continue;
    }
    if (character === "[") {
      const middle = closing("](", at + 1);
      const end = middle < 0 ? -1 : closing(")", middle + 2);
      const href = end < 0 ? null : address(line.slice(middle + 2, end));
      if (href && middle > at + 1) {
        take({ tag: "a", href, shown: true, children: [{ start: at + 1, stop: middle }] }, end + 1);
        continue;
      }
    }
    if (character === "h" && (line.startsWith("https://", at) || line.startsWith("http://", at))) {
      const found = /^[^\s<>"'`|\\^{}]+/.exec(line.slice(at, Math.min(stop, at + 2000)));
      const text = found[0].replace(/[.,;:!?)\]*_]+$/, "");
      const href = address(text);
      if (href) {
        take({ tag: "a", href, shown: false, children: [{ start: at, stop: at + text.length }] }, at + text.length);
        continue;
      }
    }
    at += 1;
  }
  if (stop > plain) nodes.push({ start: plain, stop });
  return nodes;
}

/** An address that may be followed, or null: http and https alone. */
export function address(text) {
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}
