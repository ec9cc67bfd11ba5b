// Three figures of what training does. climb, spring and orders are computed without a network,
// by exact gradients or (orders) by samples; a test compares them with torch and numpy.

// dH' / dz for groups of tied tokens: pi of one token and how many of a group are in the nucleus
// -> q of one token, H', and the gradient of H' for the logit of one token (0 where none is in)
function nucleusOf(pi, inside) {
  const mass = sum(pi.map((x, i) => inside[i] * x));
  const q = pi.map((x) => x / mass);
  const h = -sum(q.map((x, i) => (inside[i] ? inside[i] * x * Math.log(x) : 0)));
  return { h, push: q.map((x, i) => (inside[i] ? -x * (Math.log(x) + h) : 0)) };
}

// how many tokens of each group are in the nucleus; the likeliest group first
function countInside(pi, counts, p) {
  if (p >= 1) return [...counts];
  const inside = counts.map(() => 0);
  const order = pi.map((_, i) => i).sort((a, b) => pi[b] - pi[a]);
  let before = 0;
  for (const i of order) {
    if (before >= p) break;
    inside[i] = Math.min(counts[i], Math.max(1, Math.ceil((p - before) / pi[i] - 1e-9)));
    before += inside[i] * pi[i];
  }
  return inside;
}

// five sensible tokens and a tail of vocab - 5 that share a logit: ascent on the expected reward
// (1 for a sensible token) + coefficient * H'. -> the tail's probability at each step, and the end
function climb(vocab, p, coefficient, steps = 400, rate = 0.5) {
  const counts = [1, 1, 1, 1, 1, vocab - 5];
  const logits = [2, 1, 0, -0.5, -1];
  const weight = sum(logits.map(Math.exp));
  logits.push(Math.log(((0.005 / 0.995) * weight) / (vocab - 5)));
  const masses = [];
  let now;
  for (let step = 0; step <= steps; step++) {
    const top = Math.max(...logits);
    const weights = logits.map((z) => Math.exp(z - top));
    const total = sum(weights.map((w, i) => w * counts[i]));
    const pi = weights.map((w) => w / total);
    const inside = countInside(pi, counts, p);
    const { h, push } = nucleusOf(pi, inside);
    const tail = pi[5] * counts[5];
    const entropyOfAll = -sum(pi.map((x, i) => counts[i] * x * Math.log(x)));
    now = { h, entropy: entropyOfAll, size: sum(inside) };
    masses.push(tail);
    for (let i = 0; i < 6; i++) {
      const reward = (i < 5 ? pi[i] : tail) * ((i < 5 ? 1 : 0) - (1 - tail));
      const share = i < 5 ? push[i] : inside[5] * push[5];
      logits[i] += rate * (reward + coefficient * share);
    }
  }
  return { masses, ...now };
}

const entropyGradient = (pi, h) => pi.map((x) => (x > 0 ? -x * (Math.log(x) + h) : 0));

// the first logit of n tokens, the others 0, at which the entropy is h
function leadFor(h, n = 20) {
  let low = 0;
  let high = 40;
  for (let i = 0; i < 100; i++) {
    const middle = (low + high) / 2;
    const logits = [middle, ...Array(n - 1).fill(0)];
    if (entropy(softmax(logits, 1)) > h) low = middle;
    else high = middle;
  }
  return low;
}

// 20 tokens, of which the first earns `gain` more. -> H at each step of ascent on the reward and
// on -beta (H - anchor)^2 (a spring), or on beta H (a bonus)
function spring(beta, gain, start, isBonus, anchor = 1.5, steps = 400, rate = 0.5) {
  const logits = [leadFor(start), ...Array(19).fill(0)];
  const found = [];
  for (let step = 0; step <= steps; step++) {
    const pi = softmax(logits, 1);
    const h = entropy(pi);
    found.push(h);
    const force = isBonus ? beta : -2 * beta * (h - anchor);
    const slope = entropyGradient(pi, h);
    const mean = pi[0] * gain;
    for (let v = 0; v < 20; v++) {
      logits[v] += rate * (pi[v] * ((v === 0 ? gain : 0) - mean) + force * slope[v]);
    }
  }
  return found;
}

// random numbers in [0, 1): mulberry32, the same for the same seed
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const CHANCES = [0.7, 0.7, 0.7, 0.1]; // of being right: three good orders and a bad one

// an estimate of the gradient of the expected reward from samples: the mean of A * (one - pi)
function sampledGradient(pi, samples, random) {
  const drawn = [];
  for (let i = 0; i < samples; i++) {
    const u = random();
    let order = 0;
    let total = pi[0];
    while (u >= total && order < 3) total += pi[++order];
    drawn.push({ order, reward: random() < CHANCES[order] ? 1 : 0 });
  }
  const mean = sum(drawn.map((x) => x.reward)) / samples;
  return pi.map((x, j) => sum(drawn.map((d) => (d.reward - mean) * ((d.order === j) - x))) / samples);
}

// the probabilities of the four orders at each step; samples = 0: the exact gradient
function orders(samples, beta, lead, seed, steps = 2000, rate = 0.5) {
  const random = randomNumbers(seed);
  const logits = [lead, 0, 0, 0];
  const anchor = entropy(softmax(logits, 1));
  const found = [];
  for (let step = 0; step <= steps; step++) {
    const pi = softmax(logits, 1);
    found.push(pi);
    const h = entropy(pi);
    const mean = sum(pi.map((x, j) => x * CHANCES[j]));
    const exact = pi.map((x, j) => x * (CHANCES[j] - mean));
    const gradient = samples ? sampledGradient(pi, samples, random) : exact;
    const slope = entropyGradient(pi, h);
    for (let j = 0; j < 4; j++) logits[j] += rate * (gradient[j] - 2 * beta * (h - anchor) * slope[j]);
  }
  return found;
}

// ------------------------------------------------------------------------------- the drawings
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// names that are at least `gap` apart: each moves down only as far as it must, then all move up
function pullApart(places, gap, bottom) {
  const order = places.map((_, i) => i).sort((a, b) => places[a] - places[b]);
  const found = [...places];
  order.forEach((i, k) => {
    if (k > 0) found[i] = Math.max(found[i], found[order[k - 1]] + gap);
  });
  for (let k = order.length - 1; k >= 0; k--) {
    const most = k === order.length - 1 ? bottom : found[order[k + 1]] - gap;
    found[order[k]] = Math.min(found[order[k]], most);
  }
  return found;
}

// lines over steps with their names at their ends; lines: [{name, values, kind}]
function drawChart(id, lines, top, level) {
  const place = byId(id);
  const width = Math.max(220, place.clientWidth);
  const height = 190;
  const edge = { left: 34, right: 84, top: 8, bottom: 22 };
  const steps = lines[0].values.length - 1;
  const x = (step) => edge.left + (step / steps) * (width - edge.left - edge.right);
  const y = (value) => height - edge.bottom - (value / top) * (height - edge.top - edge.bottom);
  const ends = lines.map((line) => `${line.name} ends at ${line.values[steps].toFixed(3)}`);
  const made = svg("svg", { width, height, role: "img", "aria-label": `Lines over ${steps} steps: ${ends.join(", ")}.` });
  for (const share of [0, 0.5, 1]) {
    const at = y(share * top);
    made.append(svg("line", { x1: edge.left, x2: x(steps), y1: at, y2: at, class: "grid" }));
    made.append(svg("text", { x: edge.left - 5, y: at + 4, class: "tick end" }, (share * top).toFixed(1)));
  }
  for (const step of [0, steps / 2, steps]) made.append(svg("text", { x: x(step), y: height - 6, class: "tick middle" }, step));
  if (level) made.append(svg("line", { x1: edge.left, x2: x(steps), y1: y(level), y2: y(level), class: "level" }));
  const last = lines.map((line) => y(line.values[steps]));
  const heights = pullApart(last, 14, height - edge.bottom);
  const thin = Math.max(1, Math.floor(steps / 400));
  lines.forEach((line, i) => {
    const points = [];
    for (let step = 0; step <= steps; step += thin) points.push(`${x(step).toFixed(1)},${y(line.values[step]).toFixed(1)}`);
    made.append(svg("polyline", { points: points.join(" "), class: `curve ${line.kind}` }));
    made.append(svg("line", { x1: x(steps) + 2, y1: last[i], x2: x(steps) + 12, y2: heights[i], class: `leader ${line.kind}` }));
    made.append(svg("text", { x: x(steps) + 15, y: heights[i] + 4, class: `name ${line.kind}` }, line.name));
  });
  place.replaceChildren(made);
}

// a slider whose positions are a list of values; the value is what is shown and said
function readChoice(id) {
  const input = byId(id);
  const text = input.dataset.values.split(" ")[Number(input.value)];
  input.setAttribute("aria-valuetext", text);
  document.querySelector(`output[for=${id}]`).value = text;
  return text === "exact" ? 0 : Number(text);
}

function drawClimb() {
  const vocab = readChoice("climb-tokens");
  const p = readSlider("climb-p");
  const coefficient = readSlider("climb-coefficient");
  const found = climb(vocab, p, coefficient);
  show("climb-mass", found.masses.at(-1), 4);
  show("climb-entropy", found.entropy, 3);
  show("climb-nucleus-entropy", found.h, 3);
  show("climb-size", found.size, 0);
  const lines = [
    { name: "nonsense", values: found.masses, kind: "first" },
    { name: "no bonus", values: climb(vocab, p, 0).masses, kind: "fourth" },
  ];
  drawChart("climb-chart", lines, 1);
}

function drawSpring() {
  const beta = readChoice("spring-beta");
  const gain = readSlider("spring-gain");
  for (const name of ["spring", "bonus"]) {
    const starts = { low: 0.5, middle: 1.5, high: 2.6 };
    const kinds = { low: "first", middle: "second", high: "third" };
    const lines = Object.entries(starts).map(([where, start]) => {
      const values = spring(beta, gain, start, name === "bonus");
      show(`${name}-${where}`, values.at(-1), 2);
      return { name: `from ${start}`, values, kind: kinds[where] };
    });
    drawChart(`${name}-chart`, lines, 3, name === "spring" ? 1.5 : 0);
  }
}

function drawOrders() {
  const seed = readSlider("orders-seed", 0);
  const samples = readChoice("orders-samples");
  const lead = readSlider("orders-lead");
  const beta = readChoice("orders-beta");
  const kinds = ["first", "second", "third", "fourth"];
  for (const [name, weight] of [["alone", 0], ["anchored", beta]]) {
    const found = orders(samples, weight, lead, seed);
    const lines = kinds.map((kind, j) => {
      const values = found.map((pi) => pi[j]);
      show(`${name}-${j + 1}`, values.at(-1), 3);
      return { name: j < 3 ? `order ${j + 1}` : "bad order", values, kind };
    });
    drawChart(`${name}-chart`, lines, 1);
  }
}

const DRAWN = { climb: drawClimb, spring: drawSpring, orders: drawOrders };
for (const [name, draw] of Object.entries(DRAWN)) {
  for (const input of document.querySelectorAll(`#figure-${name} input`)) input.addEventListener("input", draw);
  draw();
}
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === lastWidth) return; // a phone hides its own bars: nothing to draw
  lastWidth = innerWidth;
  for (const draw of Object.values(DRAWN)) draw();
});
