"""Talk to a server over gRPC: `trinity.v1.Inference`, as protos/trinity/v1/inference.proto describes it.

    .venv/bin/python examples/grpc_client.py 127.0.0.1:9000 "def main("

Any number of Delta and then one Final, unless the call fails: then grpc.RpcError has the status and a sentence. The key, where
the server wants one, is in TRINITY_API_KEY.
"""

import argparse
import os

import grpc

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import inference_pb2_grpc as rpc


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="HOST:PORT")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    key = os.environ.get("TRINITY_API_KEY")
    metadata = [("authorization", f"Bearer {key}")] if key else []
    text = ""
    with grpc.insecure_channel(given.address) as channel:  # with TLS: grpc.secure_channel(address, credentials)
        stub = rpc.InferenceStub(channel)
        model = stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=10).models[0]
        print(f"{model.name}: up to {model.max_model_len} tokens, weights of step {model.version}")
        sampling = pb.SamplingParams(max_tokens=given.max_tokens, temperature=0)
        asked = pb.GenerateRequest(model=model.name, text=given.prompt, sampling=sampling)
        for response in stub.Generate(asked, metadata=metadata, timeout=60):
            if response.WhichOneof("event") == "delta":
                text += response.delta.text
                print(response.delta.text, end="", flush=True)
            else:
                final = response.final
                print(f"\n{final.usage.completion_tokens} tokens, {pb.FinishReason.Name(final.finish_reason)}")
    return text


if __name__ == "__main__":
    main()
