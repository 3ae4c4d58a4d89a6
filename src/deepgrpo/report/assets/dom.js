// ---- elements. Text is always set as text: model output is never parsed as markup.

const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [name, handler] of Object.entries(value)) node.addEventListener(name, handler);
    else if (key === "css") for (const [name, each] of Object.entries(value)) node.style.setProperty(name, each);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function choose(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
}

// ---- tooltip

const tip = {
  show(x, y, ...content) {
    const box = byId("tip");
    box.replaceChildren(...content.flat(Infinity));
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = x + 14 + width > innerWidth ? x - width - 14 : x + 14;
    const top = y + 16 + height > innerHeight ? y - height - 12 : y + 16;
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${Math.max(4, top)}px`;
  },
  hide() {
    byId("tip").hidden = true;
  },
  speak() {
    byId("spoken").textContent = byId("tip").innerText;
  },
};

addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hide();
});
addEventListener("scroll", () => tip.hide(), { passive: true });

// ---- redraw on resize

const redraws = new Map();
const watcher = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const known = redraws.get(entry.target);
    const width = Math.round(entry.contentRect.width);
    if (known && width > 0 && width !== known.width) {
      known.width = width;
      known.draw(width);
    }
  }
});

// Draw into `host` now and whenever its width changes.
function drawWide(host, draw) {
  if (!host.isConnected) return; // replaced before it could be drawn
  const width = Math.round(host.clientWidth) || 430;
  redraws.set(host, { width, draw });
  watcher.observe(host);
  draw(width);
}

function forget(host) {
  for (const each of [...redraws.keys()]) {
    if (host.contains(each)) {
      redraws.delete(each);
      watcher.unobserve(each);
    }
  }
}
