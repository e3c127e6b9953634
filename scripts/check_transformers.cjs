// A directory that tk exported, and on standard input {"prompts": [[id …] …], "max_new_tokens": N}: what transformers.js
// generates behind each prompt, greedily, goes out as JSON lists of ids. Run by scripts/check_ecosystem.py.
//
//     node scripts/check_transformers.cjs DIR < QUESTION
const { readFileSync } = require("node:fs");
const { createRequire } = require("node:module");
const path = require("node:path");

const packages = createRequire(path.join(__dirname, "../.deps/node/"));
const { AutoModelForCausalLM, Tensor, env } = packages("@huggingface/transformers");

async function main() {
  const directory = path.resolve(process.argv[2]);
  const { prompts, max_new_tokens } = JSON.parse(readFileSync(0, "utf-8"));
  env.allowRemoteModels = false;
  env.localModelPath = path.dirname(directory);
  const how = { dtype: "fp32", use_external_data_format: true };
  const model = await AutoModelForCausalLM.from_pretrained(path.basename(directory), how);
  const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const found = [];
  for (const ids of prompts) {
    const inputs = { input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) };
    const [all] = (await model.generate({ ...inputs, max_new_tokens, do_sample: false })).tolist();
    found.push(all.slice(ids.length).map(Number));
  }
  console.log(JSON.stringify(found));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
