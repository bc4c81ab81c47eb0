// How numbers are written.

export const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

export const whole = (value) => Math.round(value).toLocaleString("en-US");

/** Seconds as "0.21 s", "14.2 s", "2 min 5 s". */
export function seconds(value) {
  if (value < 9.995) return `${value.toFixed(2)} s`;
  if (value < 59.95) return `${value.toFixed(1)} s`;
  const all = Math.round(value);
  return `${Math.floor(all / 60)} min ${all % 60} s`;
}

/** A share of 1 with about three digits: "21.3 %", "0.042 %", and no more zeros than a column of them has room for. */
export function percent(share) {
  const value = share * 100;
  if (value === 0) return "0 %";
  if (value >= 99.95) return "100 %";
  if (value < 0.001) return "< 0.001 %";
  return `${value >= 10 ? value.toFixed(1) : value >= 0.1 ? value.toFixed(2) : value.toPrecision(2)} %`;
}

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(0)} kB`;
  return `${(count / 1e6).toFixed(1)} MB`;
}

export const rate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
