// Files become media of a question.

import { asWav, dataUri } from "./sound.js";

const MOST_BYTES = 40e6;
const STARTS = { // of files, one character a byte
  PNG: /^\x89PNG\r\n\x1a\n/,
  JPEG: /^\xff\xd8\xff/,
  GIF: /^GIF8/,
  WebP: /^RIFF[^]{4}WEBP/,
  BMP: /^BM/,
};

/**
 * Pictures keep their bytes, so that the model sees what was given; sounds become WAV.
 * `reads`: formats of pictures that the server reads, null where it did not say. @throws {Error} in words
 */
export async function medium(file, takes, reads) {
  const type = file.type.split("/")[0];
  if (type !== "image" && type !== "audio") {
    throw new Error(`${file.name || "That"} is neither a picture nor a sound${file.type ? ` (${file.type})` : ""}.`);
  }
  if (takes && !takes.includes(type)) {
    throw new Error(`The model takes no ${type === "image" ? "pictures" : "sounds"}. Choose one that does.`);
  }
  if (file.size > MOST_BYTES) throw new Error(`${file.name} is larger than ${MOST_BYTES / 1e6} MB.`);
  if (type === "audio") {
    const { url, seconds } = await asWav(file);
    return { type, name: file.name || "sound.wav", url, seconds, regions: [] };
  }
  const start = String.fromCharCode(...new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  if (reads && !reads.some((format) => STARTS[format]?.test(start))) {
    throw new Error(`${file.name || "That"} is no picture that the server reads. It reads ${reads.join(", ")}.`);
  }
  return picture(file.name || "picture", await dataUri(file));
}

/** @throws {Error} if the browser cannot show it, since boxes on it would then be guesses */
export async function picture(name, url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new Error(`${name} is no picture that this browser can show.`);
  }
  return { type: "image", name, url, width: image.naturalWidth, height: image.naturalHeight, regions: [] };
}
