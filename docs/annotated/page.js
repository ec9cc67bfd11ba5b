// The page itself: formulas and the lines that compute them, folded docstrings, the bar.
"use strict";

// a formula and its lines are marked together, wherever the pointer or the focus is
for (const formula of document.querySelectorAll(".formula")) {
  const lines = formula.dataset.lines.split(" ").map((n) => document.getElementById(`L${n}`));
  const all = [formula, ...lines];
  const mark = (on) => all.forEach((x) => x.classList.toggle("lit", on));
  for (const place of all) {
    for (const event of ["pointerenter", "focusin"]) place.addEventListener(event, () => mark(true));
    for (const event of ["pointerleave", "focusout"]) place.addEventListener(event, () => mark(false));
  }
}

// on a narrow screen a docstring is folded to its first line, until it is opened
const narrow = matchMedia("(max-width: 56rem)");
const fold = () => document.querySelectorAll("details.doc").forEach((x) => (x.open = !narrow.matches));
narrow.addEventListener("change", fold);
fold();

// the bar shows on which sides it goes on, and the function that is being read
const bar = document.querySelector("nav .bar-of-links");
function showEnds() {
  const left = bar.scrollLeft > 2;
  const right = bar.scrollLeft + bar.clientWidth < bar.scrollWidth - 2;
  bar.parentElement.dataset.more = [left ? "left" : "", right ? "right" : ""].join(" ").trim();
}
const links = [...bar.querySelectorAll("a")];
const headings = links.map((link) => document.querySelector(link.hash));
function showPlace() {
  const passed = headings.filter((x) => x.getBoundingClientRect().top < innerHeight / 3);
  const here = passed.length - 1;
  if (links[here]?.getAttribute("aria-current")) return;
  links.forEach((link, i) => (i === here ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current")));
  if (here >= 0) bar.scrollLeft = links[here].offsetLeft - bar.clientWidth / 3;
}
bar.addEventListener("scroll", showEnds);
addEventListener("resize", showEnds);
addEventListener("scroll", showPlace, { passive: true });
showEnds();
