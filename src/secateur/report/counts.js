// Stored histograms: read, located and counted, as `secateur.report.histogram` does it in Python.
{
  // Counts are base64 of variable-length integers; a zero is followed by how many zeros follow it.
  const unpack = (text) => {
    const bytes = atob(text);
    const counts = [];
    let at = 0;
    const take = () => {
      let value = 0, scale = 1, byte;
      do {
        byte = bytes.charCodeAt(at++);
        value += (byte & 0x7f) * scale;
        scale *= 128;
      } while (byte >= 0x80);
      return value;
    };
    while (at < bytes.length) {
      const count = take();
      counts.push(count);
      if (count === 0) for (let run = take(); run > 0; run--) counts.push(0);
    }
    return counts;
  };
  const edge = (held, index) => {
    const octave = Math.floor(index / held.bins), step = (index % held.bins) / held.bins;
    return octave === 0 ? step * 2 ** held.exponent : (1 + step) * 2 ** (held.exponent + octave - 1);
  };

  // The exponent of a positive number: it lies from 2^e to below 2^(e+1). Read off its bits, so nothing rounds.
  const bits = new DataView(new ArrayBuffer(8));
  const exponent = (value) => {
    bits.setFloat64(0, value);
    return ((bits.getUint32(0) >>> 20) & 0x7ff) - 1023;
  };
  // The neighbours of a number in single precision, in which weights are compared with a threshold.
  const step32 = (value, by) => {
    bits.setFloat32(0, value);
    bits.setInt32(0, bits.getInt32(0) + by);
    return bits.getFloat32(0);
  };
  const after = (value) => step32(value, 1);
  const before = (value) => step32(value, -1);

  // The bin of a positive magnitude.
  const index = (held, magnitude) => {
    const octave = exponent(magnitude) - held.exponent;
    return octave < 0 ? Math.floor((magnitude / 2 ** held.exponent) * held.bins)
      : (1 + octave) * held.bins + Math.floor((magnitude / 2 ** (held.exponent + octave) - 1) * held.bins);
  };

  // A histogram unpacked, with `sums[i]`: how many magnitudes, zeros included, lie below bin i.
  const counted = (held) => {
    const minus = unpack(held.negative), plus = unpack(held.positive);
    const length = Math.max(minus.length, plus.length);
    const sums = new Float64Array(length + 1);
    sums[0] = held.zeros;
    for (let at = 0; at < length; at++) sums[at + 1] = sums[at] + (minus[at] || 0) + (plus[at] || 0);
    return { ...held, minus, plus, sums, most: Math.max(-held.min, held.max) };
  };
  // How many values have a magnitude of at most tau: at least `low`, at most `high`; see Histogram.count_up_to.
  const upTo = (held, tau) => {
    if (tau === 0) return { low: held.zeros, high: held.zeros, estimate: held.zeros };
    const next = after(Math.fround(tau));
    if (!(next <= held.most)) return { low: held.n, high: held.n, estimate: held.n };
    const at = index(held, next), start = edge(held, at);
    const low = held.sums[at], high = start < next ? held.sums[at + 1] : low;
    return { low, high, estimate: low + Math.round(((next - start) / (edge(held, at + 1) - start)) * (high - low)) };
  };

  Object.assign(charts, { before, counted, edge, index, unpack, upTo });
}
