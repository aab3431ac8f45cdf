"""The generated Python is what the .proto file says, and the wire format keeps names, numbers and types of the last release."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from proto_changes import breaks

from protos.trinity.v1 import inference_pb2 as pb
from protos.trinity.v1 import placement_pb2

ROOT = Path(__file__).parents[2]
RELEASE = Path(__file__).with_name("protos_of_release.binpb")  # scripts/freeze_protos.sh writes it anew for a release
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


def present():
    files = [FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb) for module in (pb, placement_pb2)]
    return {file.name: file for file in files}


def test_clients_of_the_last_release_are_understood():
    old = FileDescriptorSet.FromString(RELEASE.read_bytes()).file
    assert {file.name for file in old} == set(present())
    assert breaks(old, present().values()) == []


def remove(items, name):
    items.remove(next(each for each in items if each.name == name))


def change(items, which, **values):
    found = next(each for each in items if each.name == which)
    for key, value in values.items():
        setattr(found, key, value)


def fields(file, message):
    return next(each for each in file.message_type if each.name == message).field


BROKEN = {
    "message GenerateRequest is gone": lambda f: remove(f.message_type, "GenerateRequest"),
    "Delta.text = 1 is gone": lambda f: remove(fields(f, "Delta"), "text"),
    "Delta.text = 1 has another name": lambda f: change(fields(f, "Delta"), "text", name="words"),
    "Delta.text = 1 has another type": lambda f: change(
        fields(f, "Delta"), "text", type=FieldDescriptorProto.TYPE_BYTES
    ),
    "Delta.text = 1 has another label": lambda f: change(
        fields(f, "Delta"), "text", label=FieldDescriptorProto.LABEL_REPEATED
    ),
    "GenerateRequest.sampling = 5 has another type_name": lambda f: change(
        fields(f, "GenerateRequest"), "sampling", type_name=".trinity.v1.Usage"
    ),
    "GenerateRequest.text = 2 is in another oneof": lambda f: fields(f, "GenerateRequest")[1].ClearField("oneof_index"),
    "Role.ROLE_USER = 2 is gone": lambda f: change(f.enum_type[0].value, "ROLE_USER", number=9),
    "rpc Inference.Tokenize is gone": lambda f: remove(f.service[0].method, "Tokenize"),
    "rpc Inference.Generate has another server_streaming": lambda f: change(
        f.service[0].method, "Generate", server_streaming=False
    ),
    "protos/trinity/v1/inference.proto is gone": lambda f: setattr(f, "package", "trinity.v2"),
}


@pytest.mark.parametrize("said", BROKEN)
def test_what_breaks_clients_is_found(said):
    old, new = present(), present()
    BROKEN[said](new["protos/trinity/v1/inference.proto"])
    assert any(line.startswith(said) for line in breaks(old.values(), new.values()))
    assert breaks(new.values(), new.values()) == []
