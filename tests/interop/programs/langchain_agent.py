"""LangChain's model for OpenAI, over either of its APIs: a call and the answer after it, whole and streamed."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather of a city"""
    return "rain"


url, api = sys.argv[1:]
model = ChatOpenAI(
    base_url=f"{url}/v1", api_key="unused", model="fake", max_retries=0, use_responses_api=api == "responses"
).bind_tools([weather])
messages = [HumanMessage("What is the weather?")]
message = model.invoke(messages)
[call] = message.tool_calls
print(call["name"], call["args"]["city"])
messages += [message, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
print("".join(chunk.text if isinstance(chunk.text, str) else chunk.text() for chunk in model.stream(messages)))
