// The page of `tk serve`: a form for the model's task, and what the server answers to it. Everything that a user or a model
// says is put in as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);

/** The key that the server asks for. It is kept nowhere else. */
let key = "";
/** What `/info` says of each model. */
let models = [];
/** What ends the request under way. */
let underWay = null;

/** An element with attributes and children; a child that is a text is one. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    made.setAttribute(attribute, value);
  }
  made.append(...children);
  return made;
}

/** Why the server gave no answer. */
class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Asks the server, with the key. What is not 200 becomes a Refusal. */
async function ask(path, body, signal) {
  const headers = {};
  if (key) {
    headers.Authorization = `Bearer ${key}`;
  }
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") {
      throw error;
    }
    throw new Refusal(0, "the server can't be reached");
  }
  if (!response.ok) {
    const text = await response.text();
    let message = text;
    try {
      const { error } = JSON.parse(text);
      message = error.message ?? error;
    } catch {
      // what is no JSON is told as it is
    }
    throw new Refusal(response.status, message || `the server answered with ${response.status}`);
  }
  return response;
}

/** A score with three digits behind the point. */
const short = (score) => score.toFixed(3);

/**
 * Names with scores, each with a bar: a share of 1, or of the largest where they are no shares. The first stands out where
 * they come from the best.
 */
function bars(rows, ranked = true) {
  const largest = Math.max(1, ...rows.map(({ score }) => Math.abs(score)));
  const list = element("ol", { class: "scores" });
  rows.forEach(({ name, score }, i) => {
    const bar = element("div", { class: "bar" });
    bar.style.width = `${(100 * Math.abs(score)) / largest}%`;
    list.append(
      element(
        "li",
        {},
        element("span", { class: ranked && i === 0 ? "name best" : "name" }, name),
        element("span", { class: "number" }, short(score)),
        element("div", { class: "track", "aria-hidden": "true" }, bar),
      ),
    );
  });
  return list;
}

/** A text with marks. `start` and `end` count characters, as the server does: not JavaScript's UTF-16 units. */
function marked(text, marks) {
  const characters = Array.from(text);
  const part = (start, end) => characters.slice(start, end).join("");
  const shown = element("p", { class: "text" });
  const kinds = [...new Set(marks.map(({ kind }) => kind))];
  let at = 0;
  for (const { start, end, kind, title } of [...marks].sort((a, b) => a.start - b.start)) {
    if (start < at || end <= start) {
      continue;
    }
    shown.append(part(at, start));
    const mark = element("mark", { class: `m${kinds.indexOf(kind) % 6}`, title }, part(start, end));
    if (kind) {
      mark.append(element("span", { class: "tag" }, kind));
    }
    shown.append(mark);
    at = end;
  }
  shown.append(part(at));
  return shown;
}

const heading = (text) => element("h2", {}, text);

/** What the headers say of an answer. */
function took(response) {
  const header = (name) => response.headers.get(name);
  const said = [`${header("x-total-time")} ms`, `${header("x-compute-tokens")} tokens`, header("x-compute-type")];
  return element("p", { class: "took" }, said.filter((part) => part && !part.startsWith("null")).join(" · "));
}

/** A field of a form: its name, its label, and what else it has. */
const area = (name, label, more = {}) => ({ name, label, rows: 4, ...more });

/** What each task is asked with, and how its answers are shown. */
const TASKS = {
  "text-classification": {
    fields: [area("text", "Text"), area("pair", "Second text, of a pair", { rows: 2, optional: true })],
    action: "Classify",
    path: "predict",
    body: ({ text, pair }) => ({ inputs: pair ? [text, pair] : [text] }),
    show: (labels) => {
      const rows = labels.map(({ label, score }) => ({ name: label, score }));
      return rows[0].name === undefined ? [element("p", { class: "big" }, short(rows[0].score))] : [bars(rows)];
    },
  },
  "next-sentence": {
    fields: [area("text", "Sentence", { rows: 2 }), area("pair", "Next sentence", { rows: 2 })],
    action: "Compare",
    path: "predict",
    body: ({ text, pair }) => ({ inputs: [text, pair] }),
    show: (labels) => [bars(labels.map(({ label, score }) => ({ name: label, score })))],
  },
  "token-classification": {
    fields: [area("text", "Text")],
    action: "Find entities",
    path: "entities",
    body: ({ text }) => ({ inputs: text }),
    show: (entities, { text }) => {
      const marks = entities.map(({ start, end, entity, score }) => ({
        start,
        end,
        kind: entity,
        title: `${entity}, ${short(score)}`,
      }));
      const rows = entities.map(({ entity, text, score }) => ({ name: `${text} (${entity})`, score }));
      return rows.length > 0
        ? [marked(text, marks), heading("Scores"), bars(rows, false)]
        : [element("p", { class: "text" }, text), element("p", { class: "took" }, "There is no entity in it.")];
    },
  },
  "question-answering": {
    fields: [area("question", "Question", { rows: 2 }), area("context", "Text that has the answer", { rows: 7 })],
    action: "Answer",
    path: "answers",
    body: ({ question, context }) => ({ inputs: { question, context } }),
    show: ({ answer, start, end, score }, { context }) =>
      answer
        ? [
            bars([{ name: answer, score }]),
            heading("In the text"),
            marked(context, [{ start, end, kind: "", title: short(score) }]),
          ]
        : [element("p", { class: "text" }, `The text has no answer (${short(score)}).`)],
  },
  "masked-lm": {
    fields: [area("text", "Text with masks", { hint: ({ mask_token }) => `A mask is written ${mask_token}.` })],
    action: "Fill",
    path: "fills",
    body: ({ text }) => ({ inputs: text }),
    show: (fills) =>
      fills.flatMap((tokens, i) => [
        heading(fills.length > 1 ? `Mask ${i + 1}` : "For the mask"),
        bars(tokens.map(({ token, score }) => ({ name: token, score }))),
      ]),
  },
  embedding: {
    fields: [area("first", "Text", { rows: 3 }), area("second", "Text to compare", { rows: 3 })],
    action: "Compare",
    path: "similarity",
    body: ({ first, second }) => ({ inputs: { source_sentence: first, sentences: [second] } }),
    show: ([score]) => [bars([{ name: "Similarity", score }])],
  },
  "causal-lm": {
    fields: [
      area("prompt", "Prompt"),
      { name: "max_tokens", label: "Tokens", number: { min: 1, step: 1, value: 64 } },
      { name: "temperature", label: "Temperature", number: { min: 0, step: 0.1, value: 0.8 } },
    ],
    action: "Go on",
    stream: true,
  },
};

/** The form of a model's task. */
function showForm(model) {
  underWay?.abort();
  const task = TASKS[model.task];
  const form = byId("form");
  form.replaceChildren();
  byId("result").replaceChildren();
  byId("about").textContent = `${model.task} · ${model.model_dtype} · ${model.provider} · ${model.version}`;
  if (!task) {
    form.append(element("p", { class: "hint" }, `This page has no form for ${model.task}.`));
    return;
  }
  const numbers = element("div", { class: "numbers" });
  for (const { name, label, rows, optional, hint, number } of task.fields) {
    const id = `field-${name}`;
    const attributes = { id, name };
    if (!optional) {
      attributes.required = "";
    }
    if (hint) {
      attributes["aria-describedby"] = `${id}-hint`;
    }
    const field = number
      ? element("input", { ...attributes, ...number, type: "number" })
      : element("textarea", { ...attributes, rows, spellcheck: "false" });
    const shown = [element("label", { for: id }, optional ? `${label} (optional)` : label), field];
    if (hint) {
      shown.push(element("p", { class: "hint", id: `${id}-hint` }, hint(model)));
    }
    if (number) {
      numbers.append(element("div", {}, ...shown));
    } else {
      form.append(...shown);
    }
  }
  if (numbers.hasChildNodes()) {
    form.append(numbers);
  }
  const stop = element("button", { type: "button", id: "stop", hidden: "" }, "Stop");
  stop.addEventListener("click", () => underWay?.abort());
  form.append(
    element(
      "div",
      { class: "row actions" },
      element("button", { class: "main", id: "ask" }, task.action),
      stop,
      element("span", { class: "hint" }, "or Ctrl+Enter"),
    ),
  );
}

/** The data of server-sent events, as they come. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) {
      return;
    }
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) {
        yield line.slice("data: ".length);
      }
    }
  }
}

/** Shows a language model's text while it comes. */
async function showStream(model, { prompt, max_tokens, temperature }, signal) {
  const body = {
    model: model.model_id,
    prompt,
    max_tokens: Number(max_tokens),
    temperature: Number(temperature),
    stream: true,
    stream_options: { include_usage: true },
  };
  const response = await ask("v1/completions", body, signal);
  const text = element("p", { class: "text" }, element("span", { class: "prompt" }, prompt));
  byId("result").replaceChildren(text);
  let finish = "";
  for await (const data of events(response)) {
    if (data === "[DONE]") {
      return;
    }
    const { error, choices, usage } = JSON.parse(data);
    if (error) {
      throw new Refusal(0, error.message);
    }
    for (const choice of choices) {
      text.append(choice.text);
      finish = choice.finish_reason ?? finish;
    }
    if (usage) {
      const why = finish === "length" ? "as many as were asked for" : "the model has ended";
      byId("result").append(element("p", { class: "took" }, `${usage.completion_tokens} tokens · ${why}`));
    }
  }
  throw new Refusal(0, "the answer broke off");
}

/** Asks the model what the form says. */
async function submit(model) {
  const task = TASKS[model.task];
  const said = Object.fromEntries(new FormData(byId("form")));
  // a form has CRLF where its field has LF
  for (const name of Object.keys(said)) {
    said[name] = said[name].replaceAll("\r\n", "\n");
  }
  underWay?.abort();
  const own = new AbortController();
  underWay = own;
  byId("ask").disabled = true;
  byId("stop").hidden = !task.stream;
  byId("result").setAttribute("aria-busy", "true");
  try {
    if (task.stream) {
      await showStream(model, said, own.signal);
    } else {
      const response = await ask(`models/${model.model_id}/${task.path}`, task.body(said), own.signal);
      byId("result").replaceChildren(...task.show(await response.json(), said), took(response));
    }
  } catch (error) {
    if (underWay !== own) {
      return;
    }
    const message = error.name === "AbortError" ? "Stopped." : error.message;
    const shown = element("p", { class: error.name === "AbortError" ? "took" : "error", role: "alert" }, message);
    if (error.name === "AbortError") {
      byId("result").append(shown);
    } else {
      byId("result").replaceChildren(shown);
    }
  } finally {
    if (underWay === own) {
      underWay = null;
      byId("ask").disabled = false;
      byId("stop").hidden = true;
      byId("result").removeAttribute("aria-busy");
    }
  }
}

const chosen = () => models[byId("model").selectedIndex];

/** Reads what models there are, and shows the form of the first; or asks for the key. */
async function start() {
  try {
    const info = await (await ask("info")).json();
    models = info.models ?? [info];
  } catch (error) {
    const wrong = error.status === 401;
    byId("login").hidden = !wrong;
    byId("login-error").textContent = wrong && key ? "The server does not take this key." : "";
    byId("about").textContent = wrong ? "" : error.message;
    if (wrong) {
      byId("key").focus();
      byId("key").select();
    }
    return;
  }
  byId("login").hidden = true;
  byId("asking").hidden = false;
  byId("model").replaceChildren(...models.map(({ model_id }) => element("option", {}, model_id)));
  byId("choice").hidden = models.length === 1;
  document.title = models.length === 1 ? `${models[0].model_id} · tk` : "tk";
  showForm(chosen());
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  start();
});
byId("model").addEventListener("change", () => showForm(chosen()));
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit(chosen());
});
byId("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("ask").disabled) {
    event.preventDefault();
    byId("form").requestSubmit();
  }
});
start();
