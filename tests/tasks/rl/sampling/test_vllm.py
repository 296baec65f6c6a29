"""Sampling from a vLLM server: a fake one that answers over HTTP as vLLM does, or as it should not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from lightning_lora import LoRAConfig, inject_lora, load_adapter, lora_state_dict
from lightning_lora.errors import ConfigError, SamplerError
from lightning_lora.tasks.rl.sampling.samples import SamplingSettings
from lightning_lora.tasks.rl.sampling.vllm import VLLMSampler
from tests.support import tiny_models
from tests.tasks.rl.sampling.test_in_process import PROMPTS, adapted

SETTINGS = SamplingSettings(max_new_tokens=5, temperature=0.7, stop=("END",))


class FakeServer(ThreadingHTTPServer):
    """Knows its adapters, and writes down what it is asked.

    Attributes:
        faults: What to do wrong, request by request: a status code, "drop" (no answer), "hang", or None.
        change: Changes an answer to a completion request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.adapters: set[str] = set()
        self.faults: list[Any] = []
        self.change: Any = lambda answer: answer
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.done = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, content))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "drop":
            return
        if fault == "hang":
            self.server.done.wait(30)
            return
        if fault:
            return self.send_error(fault, "of the fake")
        if self.path == "/v1/load_lora_adapter":
            # As vLLM: a name that is known is refused.
            if content["lora_name"] in self.server.adapters or not Path(content["lora_path"]).is_dir():
                return self.send_error(400, "bad adapter")
            self.server.adapters.add(content["lora_name"])
            return self._answer("Success: LoRA adapter added.")
        if self.path == "/v1/unload_lora_adapter":
            self.server.adapters.remove(content["lora_name"])
            return self._answer("Success: LoRA adapter removed.")
        if content["model"] not in self.server.adapters:
            return self.send_error(404, "no such model")
        choices = [
            {
                "index": index,
                "token_ids": [index, *range(1, index % 3 + 1)],
                "logprobs": {"token_logprobs": [-float(index), *[-0.5] * (index % 3)]},
                "finish_reason": "stop" if index % 2 else "length",
            }
            for index in range(len(content["prompt"]) * content["n"])
        ]
        self._answer(json.dumps(self.server.change({"model": content["model"], "choices": choices[::-1]})))

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield fake
    fake.done.set()
    fake.shutdown()
    fake.server_close()


@pytest.fixture
def sampler(server: FakeServer, tmp_path: Path) -> VLLMSampler:
    return VLLMSampler(server.url, tmp_path / "adapters", timeout=0.5)


def drawn(sampler: VLLMSampler) -> Any:
    return sampler.sample(PROMPTS, 2, SETTINGS, torch.Generator().manual_seed(0))


def test_tokens_go_over_and_come_back_with_their_log_probabilities(server: FakeServer, sampler: VLLMSampler) -> None:
    sampler.load(adapted(tiny_models.llama()), 3)
    samples = drawn(sampler)
    path, asked = server.asked[-1]
    assert path == "/v1/completions"
    assert asked["prompt"] == [prompt.tolist() for prompt in PROMPTS]
    expected = {"model": "policy-v3", "n": 2, "max_tokens": 5, "temperature": 0.7, "top_p": 1.0, "stop": ["END"]}
    assert {name: asked[name] for name in expected} == expected
    assert samples.version == 3
    assert samples.tokens.tolist() == [[0, 0, 0], [1, 1, 0], [2, 1, 2], [3, 0, 0], [4, 1, 0], [5, 1, 2]]
    assert samples.logprobs[:, 0].tolist() == [0, -1, -2, -3, -4, -5]
    assert samples.lengths.tolist() == [1, 2, 3, 1, 2, 3]
    assert samples.finished.tolist() == [False, True] * 3


def test_each_version_has_a_name_and_a_folder_of_its_own(server: FakeServer, sampler: VLLMSampler) -> None:
    model = adapted(tiny_models.llama())
    for version in (0, 1, 1, 2):
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).add_(1)
        sampler.load(model, version)
    loaded = [asked["lora_name"] for path, asked in server.asked if path == "/v1/load_lora_adapter"]
    assert loaded == ["policy-v0", "policy-v1", "policy-v2"]
    assert server.adapters == {"policy-v2"}
    assert sorted(folder.name for folder in sampler.folder.iterdir()) == ["policy-v1", "policy-v2"]
    fresh = tiny_models.llama()
    load_adapter(fresh, sampler.folder / "policy-v2")
    assert all(torch.equal(a, b) for a, b in zip(*(lora_state_dict(m).values() for m in (fresh, model)), strict=True))


@pytest.mark.parametrize("fault", ["drop", 500, 503])
def test_a_request_that_fails_once_is_sent_again(fault: Any, server: FakeServer, sampler: VLLMSampler) -> None:
    sampler.load(adapted(tiny_models.llama()), 0)
    before = len(server.asked)
    server.faults = [fault]
    assert len(drawn(sampler).tokens) == 6
    assert len(server.asked) == before + 2


@pytest.mark.parametrize(
    ("faults", "requests", "message"),
    [
        (["drop", "drop"], 2, "/v1/completions cannot be asked: "),
        ([500, 500], 2, "/v1/completions: 500 of the fake"),
        ([400], 1, "/v1/completions: 400 of the fake"),
        (["hang"], 1, "/v1/completions gave no answer in 0.5 seconds"),
    ],
)
def test_a_request_that_fails_for_good_is_an_error_and_no_hang(
    faults: list[Any], requests: int, message: str, server: FakeServer, sampler: VLLMSampler
) -> None:
    sampler.load(adapted(tiny_models.llama()), 0)
    before = len(server.asked)
    server.faults = faults
    start = time.monotonic()
    with pytest.raises(SamplerError, match=message):
        drawn(sampler)
    assert time.monotonic() - start < 5
    assert len(server.asked) == before + requests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer | {"model": "policy-v6"}, "answered with policy-v6, asked was policy-v7"),
        (lambda answer: answer | {"choices": answer["choices"][1:]}, "gave 5 completions, asked were 6"),
        (lambda answer: {"model": answer["model"]}, "an answer without 'choices': it must be a vLLM server"),
        (
            lambda answer: answer | {"choices": [{**choice, "token_ids": None} for choice in answer["choices"]]},
            "it must be a vLLM server of 0.10.2 or newer",
        ),
        (
            lambda answer: (
                answer | {"choices": [{**choice, "logprobs": {"token_logprobs": []}} for choice in answer["choices"]]}
            ),
            "without a finite log-probability for each token",
        ),
    ],
)
def test_an_answer_to_another_question_is_an_error(
    change: Any, message: str, server: FakeServer, sampler: VLLMSampler
) -> None:
    sampler.load(adapted(tiny_models.llama()), 7)
    server.change = change
    with pytest.raises(SamplerError, match=message):
        drawn(sampler)


def test_a_rank_above_that_of_the_server_is_refused_before_it_is_asked(server: FakeServer, tmp_path: Path) -> None:
    sampler = VLLMSampler(server.url, tmp_path, max_rank=4)
    with pytest.raises(ConfigError, match=r"has rank 8, and the server takes up to 4: start it with --max-lora-rank 8"):
        sampler.load(adapted(tiny_models.llama()), 0)
    assert not server.asked


def test_a_model_without_an_adapter_is_refused(sampler: VLLMSampler) -> None:
    with pytest.raises(ConfigError, match="this model has none: train with LoRA"):
        sampler.load(tiny_models.llama(), 0)
    with pytest.raises(ConfigError, match="the sampler has no model: call load first"):
        drawn(sampler)


def test_an_adapter_that_the_server_refuses_is_told(server: FakeServer, sampler: VLLMSampler) -> None:
    server.faults = [400]
    model = tiny_models.llama()
    inject_lora(model, LoRAConfig(rank=2))
    with pytest.raises(SamplerError, match="/v1/load_lora_adapter: 400 of the fake"):
        sampler.load(model, 0)


def test_a_server_that_is_not_there_is_told(server: FakeServer, tmp_path: Path) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(SamplerError, match=r"/v1/load_lora_adapter cannot be asked: .*refused"):
        VLLMSampler(server.url, tmp_path).load(adapted(tiny_models.llama()), 0)
    with pytest.raises(ConfigError, match="url must be the address of a vLLM server"):
        VLLMSampler("localhost:8000", tmp_path)
