// Sounds as the server takes them: WAV, 16 bits, one channel. Whatever the browser decodes becomes that here.

const RATE = 16000; // of speech and of every audio tower in use; the server resamples to the model's own

/** Any sound that the browser can decode, as a data URI of a WAV file. */
export async function asWav(blob) {
  const bytes = await blob.arrayBuffer();
  const context = new OfflineAudioContext(1, 1, RATE);
  let decoded;
  try {
    decoded = await context.decodeAudioData(bytes);
  } catch {
    throw new Error("This browser cannot decode that sound. WAV, MP3, Ogg and FLAC usually work.");
  }
  const mixed = new Float32Array(decoded.length);
  for (let channel = 0; channel < decoded.numberOfChannels; channel += 1) {
    const samples = decoded.getChannelData(channel);
    for (let i = 0; i < samples.length; i += 1) mixed[i] += samples[i] / decoded.numberOfChannels;
  }
  return { url: await dataUri(new Blob([wav(mixed, decoded.sampleRate)], { type: "audio/wav" })), seconds: decoded.duration };
}

function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const ascii = (at, text) => [...text].forEach((character, i) => view.setUint8(at + i, character.charCodeAt(0)));
  ascii(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  ascii(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  ascii(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, value)) * 32767, true));
  return view.buffer;
}

export function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read."));
    reader.readAsDataURL(blob);
  });
}

/** A recording from the microphone. */
export class Recorder {
  /** @throws {Error} in words, where there is no microphone or no permission */
  async start() {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new Error("Browsers give the microphone to pages from this machine (127.0.0.1, localhost) or over HTTPS alone.");
    }
    try {
      this.source = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      throw new Error(error.name === "NotFoundError" ? "There is no microphone." : "The microphone was not given to this page.");
    }
    this.parts = [];
    this.recorder = new MediaRecorder(this.source);
    this.recorder.addEventListener("dataavailable", (event) => this.parts.push(event.data));
    this.recorder.start();
  }

  async stop() {
    const stopped = new Promise((resolve) => this.recorder.addEventListener("stop", resolve, { once: true }));
    this.recorder.stop();
    await stopped;
    for (const track of this.source.getTracks()) track.stop();
    return asWav(new Blob(this.parts, { type: this.recorder.mimeType }));
  }
}
