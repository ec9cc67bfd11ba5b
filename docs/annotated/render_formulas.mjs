// Render TeX to HTML with KaTeX. stdin: a JSON list of [TeX, display]; stdout: formulas.json.
// Called by `python build.py --formulas`, after `npm install` in this folder.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import katex from "katex";

// the fonts that the formulas need; a browser test fails if one is missing
const FONTS = ["Main-Regular", "Math-Italic", "Size1-Regular", "Size2-Regular"];

const dist = createRequire(import.meta.url).resolve("katex/dist/katex.min.css").replace(/katex\.min\.css$/, "");
const faces = readFileSync(dist + "katex.min.css", "utf8").match(/@font-face\{[^}]*\}/g);
const rules = readFileSync(dist + "katex.min.css", "utf8").replace(/@font-face\{[^}]*\}/g, "");
const inlined = FONTS.map((name) => {
  const data = readFileSync(`${dist}fonts/KaTeX_${name}.woff2`).toString("base64");
  const face = faces.find((text) => text.includes(`KaTeX_${name}.woff2`));
  return face.replace(/src:[^}]*/, `src:url(data:font/woff2;base64,${data}) format("woff2")`);
});

const licence = "/* KaTeX and its fonts: MIT licence, copyright (c) 2013-2020 Khan Academy and other contributors */\n";
const html = {};
for (const [tex, display] of JSON.parse(readFileSync(0, "utf8"))) {
  const mark = display ? "$$" : "$";
  html[mark + tex + mark] = katex.renderToString(tex, { displayMode: display, throwOnError: true, strict: "error" });
}
console.log(JSON.stringify({ katex: katex.version, html, css: licence + inlined.join("") + rules }, null, 1));
