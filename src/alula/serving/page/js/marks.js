// Marked stretches of a text that is still being written: [[start, stop]], in order and apart.

/** Mark a stretch, or take the mark off where all of it is marked. */
export function toggled(marks, start, stop) {
  const covered = marks.some(([from, to]) => from <= start && stop <= to);
  if (covered) {
    return marks.flatMap(([from, to]) => [
      [from, Math.min(to, start)],
      [Math.max(from, stop), to],
    ]).filter(([from, to]) => from < to);
  }
  const touching = marks.filter(([from, to]) => from <= stop && start <= to);
  const apart = marks.filter(([from, to]) => !(from <= stop && start <= to));
  const joined = [Math.min(start, ...touching.map(([from]) => from)), Math.max(stop, ...touching.map(([, to]) => to))];
  return [...apart, joined].sort((a, b) => a[0] - b[0]);
}

/** Marks after an edit that made `after` of `before`: they stay on their words and go with them. */
export function moved(marks, before, after) {
  let head = 0;
  const shorter = Math.min(before.length, after.length);
  while (head < shorter && before[head] === after[head]) head += 1;
  let tail = 0;
  while (tail < shorter - head && before[before.length - 1 - tail] === after[after.length - 1 - tail]) tail += 1;
  const end = before.length - tail; // before[head:end] became after[head:after.length - tail]
  const shift = after.length - before.length;
  const start = (at) => (at < head || (at === head && at < end) ? at : at >= end ? at + shift : after.length - tail);
  const stop = (at) => (at <= head ? at : at >= end ? at + shift : head);
  return marks.map(([from, to]) => [start(from), stop(to)]).filter(([from, to]) => from < to);
}

/** The word at a place of a text, or null. */
export function wordAt(text, at) {
  for (const match of text.matchAll(/[\p{L}\p{N}\p{M}_'’-]+/gu)) {
    if (match.index <= at && at <= match.index + match[0].length) return [match.index, match.index + match[0].length];
  }
  return null;
}

/** A stretch without the blanks around it. */
export function trimmed(text, start, stop) {
  while (start < stop && /\s/.test(text[start])) start += 1;
  while (start < stop && /\s/.test(text[stop - 1])) stop -= 1;
  return [start, stop];
}

/** Parts of a text in order: [{text, marked}]. */
export function parts(text, marks) {
  const made = [];
  let at = 0;
  for (const [start, stop] of marks) {
    if (start > at) made.push({ text: text.slice(at, start), marked: false });
    made.push({ text: text.slice(start, stop), marked: true });
    at = stop;
  }
  if (at < text.length) made.push({ text: text.slice(at), marked: false });
  return made;
}
