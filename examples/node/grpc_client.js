// A client of trinity.v1.Inference in Node, made from the .proto file alone: nothing is generated.
//
//     make interop                                                     # once: grpc-js and proto-loader, beside this file
//     node examples/node/grpc_client.js 127.0.0.1:9000 "The pool" --max-tokens 32
//     node examples/node/grpc_client.js 127.0.0.1:9000 "The pool" --max-tokens 1000 --cancel-after 5
//
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

// One call; returns its Final, or null where it was cancelled after so many deltas. Throws grpc.ServiceError.
async function generate(client, request, cancelAfter) {
  const call = client.generate(request, metadata(), { deadline: Date.now() + DEADLINE_MS });
  let received = 0;
  let last = null;
  try {
    for await (const { event, delta, final } of call) {
      if (event === "final") {
        last = final;
        continue; // the status comes behind it
      }
      process.stdout.write(delta.text);
      received += 1;
      if (received === cancelAfter) call.cancel();
    }
  } catch (error) {
    if (error.code !== grpc.status.CANCELLED || received !== cancelAfter) throw error;
  } finally {
    call.cancel(); // whatever happened above; harmless where the call is over
  }
  return last;
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
  options: { "max-tokens": { type: "string", default: "64" }, "cancel-after": { type: "string" } },
});
const [address, prompt] = positionals;
const client = connect(address);
try {
  const sampling = { max_tokens: Number(values["max-tokens"]), temperature: 0 };
  const final = await patiently(client, { text: prompt, sampling }, Number(values["cancel-after"]));
  const said = final ? `${final.usage.completion_tokens} tokens, ${final.finish_reason}` : "cancelled";
  console.log(`\n[${said}]`);
} catch (error) {
  console.error(`${grpc.status[error.code] ?? "failed"}: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  client.close();
}
