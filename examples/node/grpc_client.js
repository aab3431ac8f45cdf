// A client of trinity.v1.Inference in Node, made from the .proto file alone: nothing is generated.
//
//     make interop                                                     # once: grpc-js and proto-loader, beside this file
//     node examples/node/grpc_client.js 127.0.0.1:9000 "The pool" --max-tokens 32
//     node examples/node/grpc_client.js 127.0.0.1:9000 "The pool" --max-tokens 1000 --cancel-after 5
//     node examples/node/grpc_client.js 127.0.0.1:9000 "What time is it in Oslo?" --tools
//
// With --tools the prompt is a chat's, and the model may call `time_in`, which is answered here, until it says something.
// Text is printed as it comes. Cancelling frees what the request holds on the server. A full server answers RESOURCE_EXHAUSTED
// and says when to come again. TRINITY_API_KEY is sent where it is set.
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../..");
const PROTO = "protos/trinity/v1/inference.proto";
const PUSHBACK = "grpc-retry-pushback-ms";
const ATTEMPTS = 5;
const DEADLINE_MS = 600_000;
const TURNS = 5;
const TIME_IN = {
  name: "time_in",
  description: "The time in a city",
  parameters_json: JSON.stringify({ type: "object", properties: { city: { type: "string" } }, required: ["city"] }),
};

function connect(address) {
  const options = { includeDirs: [ROOT], keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };
  const { trinity } = grpc.loadPackageDefinition(loader.loadSync(PROTO, options));
  return new trinity.v1.Inference(address, grpc.credentials.createInsecure());
}

function metadata() {
  const found = new grpc.Metadata();
  if (process.env.TRINITY_API_KEY) found.set("authorization", `Bearer ${process.env.TRINITY_API_KEY}`);
  return found;
}

// One rpc; returns its Final, or null where it was cancelled after so many deltas, and what it called. Throws grpc.ServiceError.
async function generate(client, request, cancelAfter) {
  const call = client.generate(request, metadata(), { deadline: Date.now() + DEADLINE_MS });
  let received = 0;
  let last = null;
  const calls = [];
  try {
    for await (const { event, delta, final } of call) {
      if (event === "final") {
        last = final;
        continue; // the status comes behind it
      }
      process.stdout.write(delta.text);
      for (const { index, id, name, arguments: piece } of delta.tool_calls) {
        calls[index] ??= { id, name, arguments: "" }; // the first piece has id and name
        calls[index].arguments += piece;
      }
      received += 1;
      if (received === cancelAfter) call.cancel();
    }
  } catch (error) {
    if (error.code !== grpc.status.CANCELLED || received !== cancelAfter) throw error;
  } finally {
    call.cancel(); // whatever happened above; harmless where the call is over
  }
  return { final: last, calls };
}

// The tool, which any program could be. What the model wrote may be no JSON: then it is told so.
function timeIn({ arguments: written }) {
  try {
    return `${JSON.parse(written).city}: ${process.env.TIME ?? new Date().toISOString()}`;
  } catch (error) {
    return `these are no arguments: ${error.message}`;
  }
}

// A conversation until the model calls nothing more.
async function converse(client, prompt, sampling) {
  const messages = [{ role: "ROLE_USER", content: prompt }];
  for (let turn = 1; ; turn += 1) {
    const { final, calls } = await patiently(client, { chat: { messages, tools: [TIME_IN] }, sampling });
    if (!calls.length || turn === TURNS) return final;
    messages.push({ role: "ROLE_ASSISTANT", tool_calls: calls });
    for (const call of calls) {
      const answer = timeIn(call);
      console.log(`${call.name}(${call.arguments}) -> ${answer}`);
      messages.push({ role: "ROLE_TOOL", tool_call_id: call.id, content: answer });
    }
  }
}

// The same, once more when the server is full, after the time that it asks for.
async function patiently(client, request, cancelAfter) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await generate(client, request, cancelAfter);
    } catch (error) {
      const [pushback] = error.metadata?.get(PUSHBACK) ?? [];
      if (error.code !== grpc.status.RESOURCE_EXHAUSTED || pushback === undefined || attempt === ATTEMPTS) throw error;
      console.error(`RESOURCE_EXHAUSTED: ${error.details}; again in ${pushback} ms`);
      await sleep(Number(pushback));
    }
  }
}

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    "max-tokens": { type: "string", default: "64" },
    "cancel-after": { type: "string" },
    tools: { type: "boolean", default: false },
  },
});
const [address, prompt] = positionals;
const client = connect(address);
try {
  const sampling = { max_tokens: Number(values["max-tokens"]), temperature: 0 };
  const final = values.tools
    ? await converse(client, prompt, sampling)
    : (await patiently(client, { text: prompt, sampling }, Number(values["cancel-after"]))).final;
  const said = final ? `${final.usage.completion_tokens} tokens, ${final.finish_reason}` : "cancelled";
  console.log(`\n[${said}]`);
} catch (error) {
  console.error(`${grpc.status[error.code] ?? "failed"}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
