"""LiteLLM, which speaks each of the three APIs to a server: a call, and the answer after it."""

import json
import sys

import litellm

litellm.suppress_debug_info = True  # it would print that it has no prices of this model
url, provider = sys.argv[1:]
base = url if provider == "anthropic" else f"{url}/v1"
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
function = {"name": "weather", "description": "The weather of a city", "parameters": schema}
asked = {
    "model": f"{provider}/fake",
    "api_base": base,
    "api_key": "unused",
    "tools": [{"type": "function", "function": function}],
    "max_tokens": 200,
}
messages = [{"role": "user", "content": "What is the weather?"}]
message = litellm.completion(messages=messages, **asked).choices[0].message
[call] = message.tool_calls
print(call.function.name, json.loads(call.function.arguments)["city"])
messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
chunks = litellm.completion(messages=messages, stream=True, **asked)
print("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
