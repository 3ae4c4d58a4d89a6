// ---- numbers and texts for display

function count(x) {
  const size = Math.abs(x);
  if (size >= 1e9) return `${trim(x / 1e9)}G`;
  if (size >= 1e6) return `${trim(x / 1e6)}M`;
  if (size >= 1e4) return `${trim(x / 1e3)}k`;
  return Number.isInteger(x) ? x.toLocaleString("en") : trim(x);
}

const trim = (x) => String(Number(x.toPrecision(3)));
const percent = (x) => `${Math.abs(x) < 0.01 ? Number((100 * x).toPrecision(2)) : Number((100 * x).toFixed(1))}%`;
const signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "±") + String(Number(Math.abs(x).toPrecision(3)));
const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many || `${one}s`}`;

function number(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  if (size >= 1e4) return count(x);
  return String(Number(x.toPrecision(4))).replace("-", "−");
}

function time(seconds) {
  if (seconds < 90) return `${trim(seconds)} s`;
  if (seconds < 5400) return `${trim(seconds / 60)} min`;
  return `${trim(seconds / 3600)} h`;
}

// Round steps for about `wanted` ticks within [low, high].
function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Invisible characters: control characters, direction marks, zero-width characters. Line breaks and tabs get a symbol.
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]/u;

function visible(text) {
  if (!HIDDEN.test(text)) return [text];
  const parts = [];
  let plain = "";
  const flush = () => {
    if (plain) parts.push(plain);
    plain = "";
  };
  for (const character of text) {
    const code = character.codePointAt(0);
    if (!HIDDEN.test(character)) {
      plain += character;
      continue;
    }
    flush();
    const name = character === "\n" ? "⏎" : character === "\t" ? "⇥" : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    parts.push(el("span", { class: "ctl" }, name));
    if (character === "\n") plain += "\n";
    if (character === "\t") plain += "\t";
  }
  flush();
  return parts;
}
