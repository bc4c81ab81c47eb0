// Where two answers differ, word by word: the shortest edit (Myers 1986), and marks that change no element.

const MOST = 800; // edits: beyond, answers have little in common and marks would say nothing

/** [[start, stop]...] of the characters of `a` and of `b` that the other has not; null where there is no use in marks. */
export function differences(a, b) {
  const [left, right] = [words(a), words(b)];
  let head = 0;
  while (head < left.length && head < right.length && left[head].text === right[head].text) head += 1;
  let tail = 0;
  const shorter = Math.min(left.length, right.length) - head;
  while (tail < shorter && left[left.length - 1 - tail].text === right[right.length - 1 - tail].text) tail += 1;
  const [m, n] = [left.length - head - tail, right.length - head - tail];
  const path = edits(m, n, (i, j) => left[head + i].text === right[head + j].text);
  if (!path) return null;
  const ranges = (items, numbers) => {
    const merged = [];
    const changed = new Set(numbers);
    for (const number of numbers) {
      const { text, start, stop } = items[head + number];
      if (!text.trim()) continue; // blanks are marked between words that are, below, and nowhere else
      const last = merged.at(-1);
      if (last && changed.has(number - 1) && last.number === number - 2) Object.assign(last, { stop, number });
      else if (last?.number === number - 1) Object.assign(last, { stop, number });
      else merged.push({ start, stop, number });
    }
    return merged.map(({ start, stop }) => [start, stop]);
  };
  const countable = (items, numbers) => numbers.filter((number) => items[head + number].text.trim()).length;
  return {
    a: ranges(left, path.a),
    b: ranges(right, path.b),
    words: { a: countable(left, path.a), b: countable(right, path.b) },
    of: { a: left.filter((word) => word.text.trim()).length, b: right.filter((word) => word.text.trim()).length },
  };
}

function words(text) {
  const found = [];
  for (const match of text.matchAll(/\s+|[\p{L}\p{N}\p{M}_]+|[^\s\p{L}\p{N}\p{M}_]/gu)) {
    found.push({ text: match[0], start: match.index, stop: match.index + match[0].length });
  }
  return found;
}

/** Numbers of the items of a (of m) and b (of n) that a shortest edit removes and adds. */
function edits(m, n, equal) {
  if (m === 0 || n === 0) return { a: [...Array(m).keys()], b: [...Array(n).keys()] };
  const trace = [];
  let furthest = new Map([[1, 0]]);
  for (let d = 0; d <= m + n; d += 1) {
    if (d > MOST) return null;
    trace.push(new Map(furthest));
    for (let k = -d; k <= d; k += 2) {
      const down = k === -d || (k !== d && (furthest.get(k - 1) ?? -1) < (furthest.get(k + 1) ?? -1));
      let x = down ? furthest.get(k + 1) : furthest.get(k - 1) + 1;
      while (x < m && x - k < n && equal(x, x - k)) x += 1;
      furthest.set(k, x);
      if (x >= m && x - k >= n) return walkedBack(trace, d, m, n);
    }
  }
  return null;
}

function walkedBack(trace, steps, m, n) {
  const [a, b] = [[], []];
  let [x, y] = [m, n];
  for (let d = steps; d > 0; d -= 1) {
    const furthest = trace[d];
    const k = x - y;
    const down = k === -d || (k !== d && (furthest.get(k - 1) ?? -1) < (furthest.get(k + 1) ?? -1));
    const before = down ? k + 1 : k - 1;
    const px = furthest.get(before);
    const py = px - before;
    if (down) b.push(py);
    else a.push(px);
    [x, y] = [px, py];
  }
  return { a: a.reverse(), b: b.reverse() };
}

/** The text of an element as it is shown, and a way from characters of it to ranges. */
export function shownText(element) {
  const nodes = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    nodes.push({ node: walker.currentNode, start: text.length });
    text += walker.currentNode.data;
  }
  const place = (position, end) => {
    let low = 0;
    let high = nodes.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (nodes[middle].start < position || (!end && nodes[middle].start === position)) low = middle;
      else high = middle - 1;
    }
    return [nodes[low].node, position - nodes[low].start];
  };
  const range = ([start, stop]) => {
    const made = new Range();
    made.setStart(...place(start, false));
    made.setEnd(...place(stop, true));
    return made;
  };
  return { text, range };
}

/** Ranges under a name of CSS (`::highlight(name)`), by owner, so that each turn adds and takes its own. */
export class Marker {
  constructor(name) {
    this.highlight = "highlights" in CSS ? new Highlight() : null;
    if (this.highlight) CSS.highlights.set(name, this.highlight);
    this.owned = new Map();
  }

  set(owner, ranges) {
    this.clear(owner);
    if (!this.highlight) return;
    for (const range of ranges) this.highlight.add(range);
    this.owned.set(owner, ranges);
  }

  clear(owner) {
    for (const range of this.owned.get(owner) ?? []) this.highlight.delete(range);
    this.owned.delete(owner);
  }
}
