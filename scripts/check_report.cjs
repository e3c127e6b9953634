// Pages of `tk report` come in; exit code 1 goes out where one is not as it should be. scripts/check-report calls it.
"use strict";

const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const { pathToFileURL } = require("node:url");
const { chromium } = require("playwright-core");

const flags = process.argv.slice(2);
const screenshots = flags[0] === "--screenshots" ? flags.splice(0, 2)[1] : null;
/** WCAG's least contrast of text (AA). */
const LEAST_CONTRAST = 4.5;

/** The lowest contrast of a letter and what it stands on, over all elements with text of their own. Runs in the page. */
function lowestContrast() {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = rgba(color).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (rgba(color)[3] > 0) return color;
    }
    return "white";
  };
  let lowest = { contrast: Infinity };
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const text = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [luminance(text), luminance(back(element))].sort((a, b) => b - a);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < lowest.contrast) lowest = { contrast, tag: element.tagName, text: element.textContent.slice(0, 40) };
  }
  return lowest;
}

async function check(browser, file, width, colorScheme) {
  const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme });
  const asked = [];
  const wrong = [];
  page.on("request", (request) => asked.push(request.url()));
  page.on("pageerror", (error) => wrong.push(`${error}`));
  page.on("console", (message) => message.type() === "error" && wrong.push(message.text()));
  const url = pathToFileURL(path.resolve(file)).href;
  await page.goto(url);
  assert.deepEqual(asked, [url], "asked for something else");
  assert.deepEqual(wrong, []);
  assert.equal(await page.evaluate(() => window.hacked), undefined, "a text has become a script");
  assert.equal(await page.locator("script, img, link, iframe, object").count(), 0);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(wide <= width, `${wide} wide in a window of ${width}`);
  const drawings = await page.locator("svg").evaluateAll((all) =>
    all.map((svg) => [svg.getAttribute("role"), svg.getAttribute("aria-label"), svg.getBoundingClientRect().width]),
  );
  for (const [role, label, shown] of drawings) {
    assert.ok(role === "img" && label && shown > 250, `a drawing of ${shown}: ${role}, ${label}`);
  }
  await page.locator("details").evaluateAll((all) => all.forEach((one) => (one.open = true)));
  const lowest = await page.evaluate(lowestContrast);
  assert.ok(lowest.contrast >= LEAST_CONTRAST, `letters that are hardly to be read: ${JSON.stringify(lowest)}`);
  if (screenshots) {
    fs.mkdirSync(screenshots, { recursive: true });
    const name = `${path.basename(path.dirname(path.resolve(file)))}-${width}-${colorScheme}.png`;
    await page.screenshot({ path: path.join(screenshots, name), fullPage: true });
  }
  await page.close();
  return { drawings: drawings.length, lowest: lowest.contrast };
}

(async () => {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
  try {
    for (const file of flags) {
      for (const width of [380, 1600]) {
        for (const scheme of ["light", "dark"]) {
          const { drawings, lowest } = await check(browser, file, width, scheme);
          console.log(`${file}, ${width} wide, ${scheme}: ${drawings} drawings, contrast at least ${lowest.toFixed(1)}`);
        }
      }
    }
  } finally {
    await browser.close();
  }
})().catch((error) => {
  console.error(error);
  process.exit(1);
});
