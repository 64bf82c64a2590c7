// Take a few webhook deliveries from GitHub's published examples, and sign them with GitHub's own signer.
//
// In a scratch folder FOLDER:
//
//     npm install --prefix FOLDER @octokit/webhooks-examples@7.6.1 @octokit/webhooks-methods@6.0.0
//     node make_examples.mjs FOLDER
//
// writes examples.json beside this script. With --check it writes nothing, and exits 1 if the file differs.
// Payloads are kept whole. The examples are published as JSON values, not as the bytes of a delivery: `body` is the
// value as JSON.stringify writes it, and that text is what is signed.

import { readFileSync, writeFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const VERSIONS = { "webhooks-examples": "7.6.1", "webhooks-methods": "6.0.0" };
// https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries
const SECRET = "It's a Secret to Everybody";
const VECTOR = {
  body: "Hello, World!",
  signature: "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
};
// `issues` with the action `closed` is not here: the package has no example of it.
const WANTED = [
  ["issues", "opened"],
  ["issues", "labeled"],
  ["issues", "reopened"],
  ["issues", "unlabeled"],
  ["issues", "assigned"],
  ["issues", "edited"],
  ["ping", null],
  ["issue_comment", "created"],
];

function fail(message) {
  console.error(message);
  process.exit(1);
}

/** The folder of an Octokit package, which must have the version that examples.json was made with. */
function packageFolder(folder, name) {
  const path = join(resolve(folder), "node_modules", "@octokit", name);
  const { version } = JSON.parse(readFileSync(join(path, "package.json"), "utf8"));
  if (version !== VERSIONS[name]) fail(`@octokit/${name} is ${version}, not ${VERSIONS[name]}`);
  return path;
}

/** The first example of the event and action; one whose issue carries labels, if there is one. */
function choose(definitions, event, action) {
  const { examples } = definitions.find(({ name }) => name === event);
  const fitting = examples.filter((payload) => (payload.action ?? null) === action);
  if (fitting.length === 0) fail(`no example of ${event} ${action}`);
  return fitting.find(({ issue }) => issue?.labels?.length > 0) ?? fitting[0];
}

async function make(folder) {
  const source = join(packageFolder(folder, "webhooks-examples"), "api.github.com", "index.json");
  const definitions = JSON.parse(readFileSync(source, "utf8"));
  const signer = join(packageFolder(folder, "webhooks-methods"), "dist-node", "index.js");
  const { sign } = await import(pathToFileURL(signer));

  if ((await sign(SECRET, VECTOR.body)) !== VECTOR.signature) fail("the signer does not give GitHub's test vector");
  const list = [{ event: "vector", action: null, ...VECTOR }];
  for (const [event, action] of WANTED) {
    const body = JSON.stringify(choose(definitions, event, action));
    list.push({ event, action, body, signature: await sign(SECRET, body) });
  }
  return JSON.stringify(list, null, 1) + "\n";
}

const folders = process.argv.slice(2).filter((word) => word !== "--check");
if (folders.length !== 1) fail("usage: node make_examples.mjs FOLDER [--check]");
const text = await make(folders[0]);
const target = new URL("examples.json", import.meta.url);
if (!process.argv.includes("--check")) writeFileSync(target, text);
else if (readFileSync(target, "utf8") !== text) fail("examples.json differs from what the packages give");
