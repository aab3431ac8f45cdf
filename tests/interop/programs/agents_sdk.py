"""OpenAI's Agents SDK over either of its APIs, streamed: it runs the loop of calls and answers by itself."""

import asyncio
import sys

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI


@function_tool
def weather(city: str) -> str:
    """The weather of a city"""
    print("weather", city)
    return "rain"


async def main(url: str, api: str) -> None:
    kind = OpenAIResponsesModel if api == "responses" else OpenAIChatCompletionsModel
    model = kind(model="fake", openai_client=AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0))
    agent = Agent(name="forecaster", instructions="Be short.", tools=[weather], model=model)
    result = Runner.run_streamed(agent, "What is the weather?")
    async for _ in result.stream_events():
        pass
    print(result.final_output)


set_tracing_disabled(True)
asyncio.run(main(*sys.argv[1:]))
