// A directory that tk exported, and on standard input a question; what transformers.js answers goes out as JSON. Run by
// scripts/check_ecosystem.py.
//   {"prompts": [[id …] …], "max_new_tokens": N}: the ids that it generates behind each prompt, greedily
//   {"head": CLASS, "inputs": [{"input_ids": [id …], …} …]}: the logits of each text, or of its tokens
//
//     node scripts/check_transformers.cjs DIR < QUESTION
const { existsSync, readFileSync } = require("node:fs");
const { createRequire } = require("node:module");
const path = require("node:path");

const packages = createRequire(path.join(__dirname, "../.deps/node/"));
const transformers = packages("@huggingface/transformers");
const { Tensor, env } = transformers;

const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

async function generated(model, { prompts, max_new_tokens }) {
  const found = [];
  for (const ids of prompts) {
    const inputs = { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
    const [all] = (await model.generate({ ...inputs, max_new_tokens, do_sample: false })).tolist();
    found.push(all.slice(ids.length).map(Number));
  }
  return found;
}

async function logits(model, { inputs }) {
  const found = [];
  for (const input of inputs) {
    const tensors = Object.entries(input).map(([name, values]) => [name, tensor(values)]);
    const answer = await model(Object.fromEntries(tensors));
    found.push(answer.logits.tolist()[0]);
  }
  return found;
}

async function main() {
  const directory = path.resolve(process.argv[2]);
  const question = JSON.parse(readFileSync(0, "utf-8"));
  env.allowRemoteModels = false;
  env.localModelPath = path.dirname(directory);
  const how = { dtype: "fp32", use_external_data_format: existsSync(path.join(directory, "onnx/model.onnx_data")) };
  const head = transformers[question.head ?? "AutoModelForCausalLM"];
  const model = await head.from_pretrained(path.basename(directory), how);
  console.log(JSON.stringify(await (question.head ? logits : generated)(model, question)));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
