
// Two figures of the masks. The functions above `draw...` are siren.py's, for one position or
// one response; a test compares them with it.

const sum = (x) => x.reduce((a, b) => a + b, 0);

function softmax(logits, temperature) {
  const top = Math.max(...logits);
  const weights = logits.map((z) => Math.exp((z - top) / temperature));
  return weights.map((w) => w / sum(weights));
}

// the policy on the nucleus: q = pi / pi(V_p), 0 outside; pi must fall from token to token
function nucleus(pi, p) {
  let before = 0;
  const inside = pi.map((x) => {
    const chosen = p >= 1 || before < p;
    before += x;
    return chosen;
  });
  const mass = sum(pi.filter((_, v) => inside[v]));
  return { inside, mass, q: pi.map((x, v) => (inside[v] ? x / mass : 0)) };
}

const entropy = (q) => -sum(q.map((x) => (x > 0 ? x * Math.log(x) : 0)));

// dH' / dz of each logit z
function push(q, temperature) {
  const h = entropy(q);
  return q.map((x) => (x > 0 ? (-x * (Math.log(x) + h)) / temperature : 0));
}

function quantile(values, tau) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(tau * (sorted.length - 1) - 1e-9))];
}

function peakMask(h, tau) {
  if (tau === 0) return h.map(() => true);
  const theta = quantile(h, tau);
  return h.map((x) => x >= theta && x > 0);
}

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// the number as it is shown, and with all its digits as the element's value
function show(id, value, digits) {
  byId(id).value = value;
  byId(id).textContent = value.toFixed(digits);
}

function readSlider(id, digits = 2) {
  const input = byId(id);
  document.querySelector(`output[for=${id}]`).value = Number(input.value).toFixed(digits);
  return Number(input.value);
}

// a table cell with a number and its bar, which begins at `zero` (0 or the middle, 0.5)
function barCell(value, zero, className) {
  const cell = element("td", className);
  const bar = element("span", "bar");
  const length = Math.abs(value) * (1 - zero);
  bar.style.width = `${100 * length}%`;
  bar.style.left = `${100 * (value < 0 ? zero - length : zero)}%`;
  const track = element("span", zero ? "track middle" : "track");
  track.append(bar);
  const number = element("data", "", value.toFixed(3));
  number.value = value;
  cell.append(number, track);
  return cell;
}

function drawNucleus() {
  const p = readSlider("top-p");
  const temperature = readSlider("temperature");
  const pi = softmax(data.logits, temperature);
  const { inside, mass, q } = nucleus(pi, p);
  const gradient = push(q, temperature);
  show("nucleus-entropy", entropy(q), 4);
  show("entropy", entropy(pi), 4);
  show("nucleus-size", sum(inside), 0);
  show("nucleus-mass", mass, 4);
  const rows = data.first.map((token, v) => {
    const row = element("tr", inside[v] ? "inside" : "outside");
    const name = element("th", "", token);
    name.scope = "row";
    row.append(name, barCell(pi[v], 0, "pi"), barCell(q[v], 0, "q"));
    row.append(barCell(gradient[v], 0.5, "push"));
    return row;
  });
  document.querySelector("#figure-nucleus tbody").replaceChildren(...rows);
}

function drawPeaks() {
  const h = data.nucleus_entropy;
  const tau = readSlider("tau");
  const peak = peakMask(h, tau);
  const largest = Math.max(...h);
  const line = element("span", "quantile");
  line.style.bottom = `${(100 * quantile(h, tau)) / largest}%`;
  show("quantile", quantile(h, tau), 4);
  show("peak-count", sum(peak), 0);
  show("response-entropy", sum(h.filter((_, t) => peak[t])) / Math.max(1, sum(peak)), 4);
  byId("token-count").textContent = h.length;
  byId("largest").textContent = largest.toFixed(2);
  [...byId("tokens").children].forEach((made, t) => (made.className = peak[t] ? "token peak" : "token"));
  const columns = h.map((x, t) => {
    const made = element("span", peak[t] ? "column peak" : "column");
    made.style.height = `${(100 * x) / largest}%`;
    return made;
  });
  byId("columns").replaceChildren(...columns, line);
}

// the tokens are buttons; one of them is in the Tab order, the arrow keys go to the others
function makeTokens() {
  const h = data.nucleus_entropy;
  const buttons = data.tokens.map((token, t) => {
    const shown = token === " " ? "␣" : token.replace("\n", "↵").replace("<|im_end|>", "end");
    const made = element("button", "token", shown);
    made.type = "button";
    made.tabIndex = t === 0 ? 0 : -1;
    made.style.setProperty("--share", h[t] / Math.max(...h));
    for (const event of ["pointerenter", "focus", "click"]) made.addEventListener(event, () => showOptions(t));
    return made;
  });
  byId("tokens").replaceChildren(...buttons);
  byId("tokens").addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const last = buttons.length - 1;
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    buttons[Math.min(last, Math.max(0, next))].focus();
  });
}

function showOptions(t) {
  const buttons = [...byId("tokens").children];
  buttons.forEach((x, i) => {
    x.tabIndex = i === t ? 0 : -1;
    if (i === t) x.setAttribute("aria-current", "true");
    else x.removeAttribute("aria-current");
  });
  const words = data.options[t].map(([word, q]) => `${JSON.stringify(word)} ${q.toFixed(2)}`);
  const h = data.nucleus_entropy[t].toFixed(4);
  byId("token-options").textContent = `Token ${t + 1}, ${JSON.stringify(data.tokens[t])}: H′ = ${h} nats; q: ${words.join(", ")}`;
}

document.querySelectorAll(".panel").forEach((x) => (x.hidden = false));
document.querySelectorAll(".needs-script").forEach((x) => x.remove());
for (const id of ["top-p", "temperature"]) byId(id).addEventListener("input", drawNucleus);
byId("tau").addEventListener("input", drawPeaks);
makeTokens();
showOptions(24);
drawNucleus();
drawPeaks();

