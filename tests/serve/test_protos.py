"""The generated Python is what the .proto file says, and the wire format keeps its numbers."""

import os
import subprocess
import sys
from pathlib import Path

from protos.trinity.v1 import inference_pb2 as pb

ROOT = Path(__file__).parents[2]
NAMES = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


def test_generated_files_have_not_drifted(tmp_path):
    script = ROOT / "scripts" / "generate_protos.sh"
    subprocess.run([str(script), str(tmp_path)], check=True, env={**os.environ, "PYTHON": sys.executable})
    for name in NAMES:
        fresh = (tmp_path / "protos/trinity/v1" / name).read_text()
        assert fresh == (ROOT / "protos/trinity/v1" / name).read_text(), f"{name}: run scripts/generate_protos.sh"


def test_unset_sampling_fields_are_distinguishable_from_zero():
    assert not pb.SamplingParams().HasField("temperature")
    assert pb.SamplingParams.FromString(pb.SamplingParams(temperature=0).SerializeToString()).HasField("temperature")
