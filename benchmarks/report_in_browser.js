// Opens reports in headless Chromium at two widths and in both colour schemes, and prints for each: violations of axe's
// accessibility rules, how far the page is wider than the window, console messages, and requests (one: the page itself).
//
//   mkdir /tmp/browser && cd /tmp/browser && npm install puppeteer-core axe-core
//   NODE_PATH=/tmp/browser/node_modules node benchmarks/report_in_browser.js OUT runs/ranks/report.html ...
//
// Pictures of the whole pages are written to OUT. CHROMIUM names another browser than /usr/bin/chromium.
"use strict";
const fs = require("fs");
const path = require("path");
const puppeteer = require("puppeteer-core");

const AXE = fs.readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", ...(process.getuid && process.getuid() === 0 ? ["--no-sandbox"] : [])];

async function look(browser, file, out, scheme, width) {
  const page = await browser.newPage();
  const said = [], asked = [];
  page.on("console", (message) => said.push(message.text()));
  page.on("pageerror", (error) => said.push(String(error)));
  page.on("request", (request) => asked.push(request.url()));
  await page.setViewport({ width: width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto("file://" + path.resolve(file));
  // Every button once: what they do must not break anything.
  await page.evaluate(() => { for (const button of document.querySelectorAll("button")) { button.click(); button.click(); } });
  const wider = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  const name = path.basename(path.dirname(path.resolve(file))) + "-" + width + "-" + scheme + ".png";
  await page.screenshot({ path: path.join(out, name), fullPage: true });
  await page.evaluate(AXE);
  const found = await page.evaluate(async () => await axe.run());
  await page.close();
  const violations = found.violations.map((each) => each.id + " at " + each.nodes[0].target.join(" "));
  console.log(JSON.stringify({ file, scheme, width, violations, rules: found.passes.length, wider, said, requests: asked.length }));
  return violations.length + said.length + Math.max(0, wider) + asked.length - 1;
}

(async () => {
  const [out, ...files] = process.argv.slice(2);
  fs.mkdirSync(out, { recursive: true });
  const executablePath = process.env.CHROMIUM || "/usr/bin/chromium";
  const browser = await puppeteer.launch({ executablePath, args: QUIET });
  let wrong = 0;
  for (const file of files)
    for (const scheme of ["light", "dark"]) for (const width of [1280, 390]) wrong += await look(browser, file, out, scheme, width);
  await browser.close();
  process.exit(wrong ? 1 : 0);
})();
