"""Instructor: an object of a class out of an answer, in the mode that it is told."""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    days: int


url, mode = sys.argv[1:]
client = instructor.from_openai(
    OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0), mode=getattr(instructor.Mode, mode)
)
messages = [{"role": "user", "content": "What is the weather?"}]
told = client.chat.completions.create(model="fake", messages=messages, response_model=Weather, max_retries=0)
print(told.city, told.days)
