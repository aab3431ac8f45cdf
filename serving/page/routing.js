// The experts that tokens went to. Legend: T tokens, L layers with routed experts, K experts of a token in a layer.

const MAGIC_BYTES = 8;  // of a .npy file: its name and version; the length of its header follows

/** Experts of each token of prompt and answer, but for the last one, which no pass has seen. */
class Routing {
  /** `text`: the base64 of a .npy file [T, L, K] of bytes or of 16-bit numbers. */
  constructor(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)), view = new DataView(bytes.buffer);
    const [start, length] = bytes[6] === 1 ? [2, view.getUint16(MAGIC_BYTES, true)] : [4, view.getUint32(MAGIC_BYTES, true)];
    const from = MAGIC_BYTES + start, header = String.fromCharCode(...bytes.subarray(from, from + length));
    [this.T, this.L, this.K] = /'shape': \(([\d, ]+)\)/.exec(header)[1].split(",").map(Number);
    this.numbers = header.includes("u2'") ? new Uint16Array(bytes.slice(from + length).buffer) : bytes.subarray(from + length);
  }

  /** Rows of K experts, one a layer; null for a token that went to none. */
  of(position) {
    if (position >= this.T) return null;
    const { L, K } = this, start = position * L * K;
    return Array.from({ length: L }, (_, l) => [...this.numbers.subarray(start + l * K, start + (l + 1) * K)]);
  }
}
