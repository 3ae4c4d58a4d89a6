// ---- data: decoded with the page, except blocks of trees, which are decoded on demand

const DATA = JSON.parse(byId("data").textContent);
const FLAGS = ["rescued", "unrecoverable", "truncated", "mixed", "solved", "failed"];
const FLAG_NAMES = { unrecoverable: "not recovered" };
const FLAG_WORDS = {
  rescued: "a branch succeeds and beats its rollout",
  unrecoverable: "a pivot that was not recovered in any of its tries",
  truncated: "a response was cut off at the length limit",
  mixed: "the rollouts have unequal rewards",
  solved: "every rollout succeeds",
  failed: "no rollout succeeds",
};

async function unpack(text) {
  if (typeof DecompressionStream === "undefined") throw new Error("This browser cannot decompress the data: it lacks DecompressionStream (Firefox 113, Chrome 80, Safari 16.4 or later).");
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const KEPT = 4;
const opened = new Map();

// The trees of a block; the last few blocks stay in memory.
function openBlock(run, block) {
  const name = `block-${run}-${block}`;
  const found = opened.get(name) || unpack(byId(name).textContent);
  opened.delete(name);
  opened.set(name, found);
  while (opened.size > KEPT) opened.delete(opened.keys().next().value);
  return found;
}

const indices = new Map();

// The index of a run's trees, in columns, with the position of each tree in its block; null without trees.
function openIndex(run) {
  if (!indices.has(run)) {
    const text = DATA.runs[run].trees.index;
    indices.set(run, text === null ? Promise.resolve(null) : unpack(text).then((index) => {
      index.place = index.block.map((block, i) => (i && index.block[i - 1] === block ? 1 : 0));
      for (let i = 1; i < index.place.length; i++) if (index.place[i]) index.place[i] += index.place[i - 1];
      index.words = index.id.map((id, i) => `${id}\n${index.question[i]}`.toLowerCase());
      return index;
    }));
  }
  return indices.get(run);
}

const ownText = (node) => (node.k ? node.k.join("") : node.x);

// All text of a tree in lower case, for searching.
const fullText = (tree) => [tree.id, tree.question, tree.answer || "", ...tree.nodes.map(ownText)].join("\n").toLowerCase();

// Matching entries of the index. With `deep`, blocks are read one by one; `progress` returns false to stop.
async function findTrees(run, index, { step, flags, query, deep }, progress) {
  const words = query.toLowerCase();
  const wanted = flags.reduce((bits, flag) => bits | (1 << FLAGS.indexOf(flag)), 0);
  const near = [];
  for (let i = 0; i < index.id.length; i++) {
    if ((step === null || index.step[i] === step) && (index.flags[i] & wanted) === wanted) near.push(i);
  }
  if (!words) return near;
  if (!deep) return near.filter((i) => index.words[i].includes(words));
  const found = [];
  let block = -1, texts = [];
  for (const i of near) {
    if (index.block[i] !== block) {
      block = index.block[i];
      if (!progress(block)) return null;
      texts = (await unpack(byId(`block-${run}-${block}`).textContent)).map(fullText);
    }
    if (texts[index.place[i]].includes(words)) found.push(i);
  }
  return found;
}
