#!/usr/bin/env python3
"""A client that knows nothing but an address: it learns the protocol from server reflection, then uses it.

    client.py [--address HOST:PORT] [--prompt TEXT] [--max-new-tokens N] [--experts 1|2] [--soft]

Calls health, GetModelInfo and Tokenize, then streams Generate and checks that the stream is sound: one final message,
counts that add up, one model generation, the pieces of text and the token ids agreeing with Detokenize. No generated
code, none of this project's files. Needs grpcio, grpcio-reflection and grpcio-health-checking. Exit status 0: all sound.
"""

from __future__ import annotations

import argparse
import sys
import time

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "hardmax.v1.Inference"


class Service:
    """One service, its methods callable by name with plain dictionaries."""

    def __init__(self, channel: grpc.Channel, pool: DescriptorPool, name: str):
        self.channel = channel
        self.descriptor = pool.FindServiceByName(name)

    def call(self, method: str, timeout: float = 60, **fields):
        """The response message, or an iterator over them where the method streams."""
        found = self.descriptor.FindMethodByName(method)
        request = json_format.ParseDict(fields, GetMessageClass(found.input_type)())
        kind = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        stub = kind(
            f"/{self.descriptor.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        return stub(request, timeout=timeout)


def require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def show(title: str, message) -> None:
    fields = json_format.MessageToDict(message, preserving_proto_field_name=True)
    print(f"{title}: {fields}")


def generate(service: Service, prompt: str, sampling: dict, routing: dict | None) -> None:
    fields = {"text": prompt, "sampling": sampling} | ({"routing": routing} if routing else {})
    text, ids, finish, messages = "", [], None, 0
    begun = time.monotonic()
    first = None
    print(prompt, end="", flush=True)
    for response in service.call("Generate", timeout=300, **fields):
        require(finish is None, "a message came after the final one")
        first = first or time.monotonic() - begun
        messages += 1
        print(response.text, end="", flush=True)
        text += response.text
        ids += response.token_ids
        if response.HasField("finish"):
            finish = response.finish
    print()
    require(finish is not None, "the stream ended without a final message")
    show(f"finish, after {messages} messages, the first after {first:.3f} s", finish)
    usage = finish.usage
    require(usage.generated_tokens == len(ids), f"{usage.generated_tokens} tokens counted, {len(ids)} sent")
    require(0 < len(ids) <= sampling["max_new_tokens"], f"{len(ids)} tokens generated")
    whole = service.call("Detokenize", token_ids=ids).text
    # Both drop what the other one shows at the edges: a leading space, a final end-of-sequence token.
    require(whole.strip() == text.strip(), f"the stream says {text!r}, its tokens {whole!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--experts", type=int, choices=[1, 2], help="route to this many experts per token")
    parser.add_argument("--soft", action="store_true", help="mix all experts")
    args = parser.parse_args()

    with grpc.insecure_channel(args.address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=10)
        except grpc.FutureTimeoutError:
            print(f"client.py: no server at {args.address}", file=sys.stderr)
            return 2
        database = ProtoReflectionDescriptorDatabase(channel)
        services = sorted(database.get_services())
        print(f"services: {', '.join(services)}")
        require(SERVICE in services, f"{SERVICE} is not among them")

        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            print(f"health of {name or 'the server'}: {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
            require(status == health_pb2.HealthCheckResponse.SERVING, f"{name or 'the server'} is not serving")

        service = Service(channel, DescriptorPool(database), SERVICE)
        info = service.call("GetModelInfo")
        show("model", info)
        tokens = service.call("Tokenize", text=args.prompt).tokens
        print(f"prompt: {len(tokens)} tokens, {[token.token for token in tokens]}")
        require(all(token.id < info.vocab_size for token in tokens), "a token id is outside the vocabulary")

        sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
        routing = {"soft": {}} if args.soft else {"top_k": {"k": args.experts}} if args.experts else None
        generate(service, args.prompt, sampling, routing)

        # A mistake of ours must come back as one, in words, and leave the server in health.
        try:
            list(service.call("Generate", text=args.prompt, sampling={"temperature": -1.0}))
            raise AssertionError("a negative temperature was accepted")
        except grpc.RpcError as error:
            print(f"negative temperature: {error.code().name}: {error.details()}")
            require(error.code() is grpc.StatusCode.INVALID_ARGUMENT, "not INVALID_ARGUMENT")
        require(health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1, "no longer serving")
    print("all sound")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssertionError, grpc.RpcError) as failure:
        print(f"client.py: {failure}", file=sys.stderr)
        sys.exit(1)
