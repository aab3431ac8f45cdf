"""An agent of Anthropic's client: a stream with a call, and the answer after the tool's result."""

import sys

from anthropic import Anthropic

client = Anthropic(base_url=sys.argv[1], api_key="unused", max_retries=0)
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
asked = {
    "model": "fake",
    "max_tokens": 200,
    "tools": [{"name": "weather", "description": "The weather of a city", "input_schema": schema}],
}
messages = [{"role": "user", "content": "What is the weather?"}]
with client.messages.stream(messages=messages, **asked) as stream:
    message = stream.get_final_message()
[call] = [block for block in message.content if block.type == "tool_use"]
print(call.name, call.input["city"])
result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
print(client.messages.create(messages=messages, **asked).content[-1].text)
