// A directory of exported tiny models comes in; exit code 1 goes out where the page of `tk serve` does not show what the
// server answers. scripts/check-page calls it.
"use strict";

const assert = require("node:assert/strict");
const { spawn } = require("node:child_process");
const fs = require("node:fs");
const path = require("node:path");
const { chromium } = require("playwright-core");

const [directory, ...flags] = process.argv.slice(2);
const screenshots = flags[0] === "--screenshots" ? flags[1] : null;
/** Text that must stay text, with characters of two UTF-16 units in front of everything. */
const HOSTILE = `😀😀 <img src=x onerror="window.hacked = 1"> I love naïve rain in 東京 & "night" 🦀 </p><script>window.hacked = 2</script>`;

/** A server of models; the address, what asks it, and what ends it. */
async function serve(models, ...args) {
  const dirs = models.map((model) => path.join(directory, model));
  const server = spawn(process.env.TK, ["serve", "--listen", "127.0.0.1:0", "--json", "--quiet", ...args, ...dirs], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  const line = await new Promise((resolve, reject) => {
    server.stdout.once("data", (data) => resolve(data.toString()));
    server.once("exit", (code) => reject(new Error(`tk serve has ended: ${code}`)));
  });
  const address = `http://${JSON.parse(line).address}`;
  const post = async (route, body) => {
    const response = await fetch(address + route, { method: "POST", body: JSON.stringify(body) });
    assert.equal(response.status, 200, await response.clone().text());
    return response.json();
  };
  process.on("exit", () => server.kill());
  return { address, post };
}

/** A page that fails the check where it says an error, breaks its policy, or asks anyone else. */
async function open(browser, address, options = {}) {
  const page = await browser.newPage(options);
  page.setDefaultTimeout(10_000);
  const wrong = [];
  const expected = (text) => options.refused && text.includes("401");
  page.on("pageerror", (error) => wrong.push(`${error}`));
  page.on("console", (message) => message.type() === "error" && !expected(message.text()) && wrong.push(message.text()));
  page.on("request", (request) => {
    if (!request.url().startsWith(address) && !request.url().startsWith("data:")) {
      wrong.push(`asked for ${request.url()}`);
    }
  });
  await page.goto(address);
  page.assertRight = async () => {
    assert.deepEqual(wrong, []);
    assert.equal(await page.evaluate(() => window.hacked), undefined);
    assert.equal(await page.locator("img, #result script").count(), 0);
  };
  return page;
}

const short = (score) => score.toFixed(3);

/** The names and scores of all bars that are shown. */
const bars = (page) =>
  page.locator(".scores li").evaluateAll((rows) =>
    rows.map((row) => [row.querySelector(".name").textContent, row.querySelector(".number").textContent]),
  );

/** A text as it is shown, and its marks, both without the marks' tags. */
const marked = (page) =>
  page.locator("#result .text").evaluate((shown) => {
    const copy = shown.cloneNode(true);
    copy.querySelectorAll(".tag").forEach((tag) => tag.remove());
    return { text: copy.textContent, marks: [...copy.querySelectorAll("mark")].map((mark) => mark.textContent) };
  });

/** Chooses a model, fills its form, and asks. */
async function ask(page, model, fields) {
  await page.getByLabel("Model").selectOption(model);
  for (const [label, text] of Object.entries(fields)) {
    await page.getByLabel(label, { exact: true }).fill(text);
  }
  await page.locator("#ask").click();
  await page.locator("#result .took, #result .error").first().waitFor();
  assert.equal(await page.locator("#result .error").count(), 0, await page.locator("#result").textContent());
}

async function picture(page, name) {
  if (screenshots) {
    fs.mkdirSync(screenshots, { recursive: true });
    await page.screenshot({ path: path.join(screenshots, `${name}.png`), fullPage: true });
  }
}

const TESTS = {
  async "labels are shown as bars"(page, server) {
    await ask(page, "tiny-bert-single", { Text: HOSTILE });
    const labels = await server.post("/models/tiny-bert-single/predict", { inputs: [HOSTILE] });
    assert.deepEqual(await bars(page), labels.map(({ label, score }) => [label, short(score)]));
    const widths = await page.locator(".bar").evaluateAll((all) => all.map((bar) => bar.getBoundingClientRect().width));
    assert.ok(widths.every((width, i) => i === 0 || width <= widths[i - 1]), `${widths}`);
    await ask(page, "tiny-bert-single", { Text: "good", "Second text, of a pair (optional)": "bad" });
    const pair = await server.post("/models/tiny-bert-single/predict", { inputs: ["good", "bad"] });
    assert.deepEqual(await bars(page), pair.map(({ label, score }) => [label, short(score)]));
  },

  async "a regression is a number"(page, server) {
    await ask(page, "tiny-bert-regression", { Text: "rain" });
    const [{ score }] = await server.post("/models/tiny-bert-regression/predict", { inputs: ["rain"] });
    assert.equal(await page.locator("#result .big").textContent(), short(score));
  },

  async "entities are marked where they stand"(page, server) {
    await ask(page, "tiny-bert-tokens", { Text: HOSTILE });
    const entities = await server.post("/models/tiny-bert-tokens/entities", { inputs: HOSTILE });
    assert.ok(entities.length > 1, "there is nothing to see");
    const { text, marks } = await marked(page);
    assert.equal(text, HOSTILE);
    assert.deepEqual(marks, entities.map((entity) => entity.text));
    assert.deepEqual(await page.locator("mark .tag").allTextContents(), entities.map(({ entity }) => entity));
    assert.equal((await bars(page)).length, entities.length);
  },

  async "an answer is marked in its context"(page, server) {
    const question = "What? <b>";
    await ask(page, "tiny-bert-answers", { Question: question, "Text that has the answer": HOSTILE });
    const { answer } = await server.post("/models/tiny-bert-answers/answers", {
      inputs: { question, context: HOSTILE },
    });
    assert.ok(answer.length > 0, "there is nothing to see");
    assert.deepEqual(await marked(page), { text: HOSTILE, marks: [answer] });
  },

  async "masks are filled"(page, server) {
    const text = "<i> I [MASK] the rain [MASK]";
    await ask(page, "tiny-bert-masked", { "Text with masks": text });
    const fills = await server.post("/models/tiny-bert-masked/fills", { inputs: text });
    assert.deepEqual(await bars(page), fills.flat().map(({ token, score }) => [token, short(score)]));
    assert.deepEqual(await page.locator("#result h2").allTextContents(), ["Mask 1", "Mask 2"]);
    assert.match(await page.locator("#form .hint").first().textContent(), /\[MASK\]/);
  },

  async "texts are compared"(page, server) {
    await ask(page, "tiny-bert-embedding", { Text: "a good day", "Text to compare": "a good day" });
    assert.deepEqual(await bars(page), [["Similarity", "1.000"]]);
    await ask(page, "tiny-bert-embedding", { Text: "a good day", "Text to compare": HOSTILE });
    const [score] = await server.post("/models/tiny-bert-embedding/similarity", {
      inputs: { source_sentence: "a good day", sentences: [HOSTILE] },
    });
    assert.deepEqual(await bars(page), [["Similarity", short(score)]]);
  },

  async "a text comes as it is generated"(page, server) {
    const fields = { Prompt: "😀 <b>I love", Tokens: "24", Temperature: "0" };
    await ask(page, "tiny-gpt2-lm", fields);
    const body = { model: "tiny-gpt2-lm", prompt: fields.Prompt, max_tokens: 24, temperature: 0 };
    const { choices, usage } = await server.post("/v1/completions", body);
    assert.equal((await marked(page)).text, fields.Prompt + choices[0].text);
    assert.match(await page.locator("#result .took").textContent(), new RegExp(`^${usage.completion_tokens} tokens`));
    assert.ok(await page.locator("#stop").isHidden());
  },

  async "what is refused is told"(page) {
    await page.getByLabel("Model").selectOption("tiny-gpt2-lm");
    await page.getByLabel("Prompt").fill("<b>rain</b> ".repeat(300));
    await page.locator("#ask").click();
    await page.locator("#result .error").waitFor();
    assert.match(await page.locator("#result .error").textContent(), /leave room/);
    assert.ok(await page.locator("#ask").isEnabled());
  },

  async "the keyboard is enough, and every field has a label"(page) {
    await page.getByLabel("Model").selectOption("tiny-bert-single");
    await page.getByLabel("Model").focus();
    await page.keyboard.press("Tab");
    await page.keyboard.type("a good day");
    await page.keyboard.press("Control+Enter");
    await page.locator("#result .took").waitFor();
    await page.keyboard.press("Tab");
    await page.keyboard.press("Tab");
    assert.equal(await page.evaluate(() => document.activeElement.id), "ask");
    const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
    assert.equal(outline, "solid");
    const unlabelled = await page.locator("input, select, textarea").evaluateAll((all) =>
      all.filter((field) => field.labels.length === 0).map((field) => field.id),
    );
    assert.deepEqual(unlabelled, []);
  },
};

/** Whether colours of texts and their grounds are far enough apart (WCAG's 4.5), as they are on the page now. */
const contrasts = (page) =>
  page.evaluate(() => {
    const light = (color) => {
      const [r, g, b] = color.match(/[\d.]+/g).map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
      const color = getComputedStyle(element).backgroundColor;
      return color === "rgba(0, 0, 0, 0)" && element.parentElement ? ground(element.parentElement) : color;
    };
    const texts = [...document.querySelectorAll("body *")].filter((element) =>
      [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim()) && element.checkVisibility(),
    );
    const far = (element) => {
      const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    return texts.filter((element) => far(element) < 4.5).map((element) => `${element.outerHTML.slice(0, 80)}: ${far(element)}`);
  });

const SHOWN = [
  ["labels", "tiny-bert-single", { Text: "I love this film, rain or not" }],
  ["entities", "tiny-bert-tokens", { Text: HOSTILE }],
  ["answer", "tiny-bert-answers", { Question: "Where does it rain at night?", "Text that has the answer": HOSTILE }],
  ["fills", "tiny-bert-masked", { "Text with masks": "I [MASK] rain" }],
  ["similarity", "tiny-bert-embedding", { Text: "a good day", "Text to compare": "rain at night" }],
  ["text", "tiny-gpt2-lm", { Prompt: "I love", Tokens: "60", Temperature: "0.8" }],
];

async function main() {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
  const server = await serve(fs.readdirSync(directory).filter((name) => name.startsWith("tiny-")));
  const keyFile = path.join(directory, "key");
  fs.writeFileSync(keyFile, "sesame\n");
  const guarded = await serve(["tiny-bert-single"], "--api-key-file", keyFile);
  let failed = 0;
  const check = async (name, test) => {
    try {
      await test();
      console.log(`ok    ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`WRONG ${name}: ${error.message}`);
    }
  };
  for (const [name, test] of Object.entries(TESTS)) {
    await check(name, async () => {
      const page = await open(browser, server.address, { refused: false });
      await page.getByLabel("Model").waitFor();
      if (name === "what is refused is told") {
        page.removeAllListeners("console"); // a refusal is told there, too
      }
      await test(page, server);
      await page.assertRight();
      await page.close();
    });
  }
  await check("the key is asked for, and a wrong one is told", async () => {
    const page = await open(browser, guarded.address, { refused: true });
    await page.getByLabel("API key").fill("open");
    await page.keyboard.press("Enter");
    await page.getByText("does not take this key").waitFor();
    await picture(page, "key");
    await page.getByLabel("API key").fill("sesame");
    await page.getByRole("button", { name: "Use it" }).click();
    await page.getByLabel("Text", { exact: true }).fill("a good day");
    assert.ok(await page.locator("#choice").isHidden(), "one model is no choice");
    await page.locator("#ask").click();
    await page.locator("#result .took").waitFor();
    await page.assertRight();
    await page.close();
  });
  for (const [scheme, width] of [["light", 1000], ["dark", 1000], ["light", 360], ["dark", 360]]) {
    await check(`everything can be read, ${scheme}, ${width} wide`, async () => {
      const page = await open(browser, server.address, { colorScheme: scheme, viewport: { width, height: 780 } });
      await page.getByLabel("Model").waitFor();
      for (const [name, model, fields] of SHOWN) {
        await ask(page, model, fields);
        const over = await page.evaluate(() => document.scrollingElement.scrollWidth - innerWidth);
        assert.ok(over <= 0, `${name} is ${over} pixels too wide`);
        assert.deepEqual(await contrasts(page), []);
        await picture(page, `${name}-${scheme}-${width}`);
      }
      await ask(page, "tiny-bert-tokens", { Text: "x".repeat(900) });
      assert.ok(await page.evaluate(() => document.scrollingElement.scrollWidth <= innerWidth), "a long word");
      await page.assertRight();
      await page.close();
    });
  }
  await browser.close();
  process.exit(failed > 0 ? 1 : 0);
}

main();
