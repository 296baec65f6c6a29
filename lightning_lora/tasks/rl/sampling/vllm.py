"""A sampler that asks a vLLM server, which is given the adapter under a new name for each version."""

from __future__ import annotations

import http.client
import json
import math
import shutil
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lightning_lora.errors import LoRAError, SamplerError, SamplingSettingError
from lightning_lora.files.adapter.save_load import save_adapter
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.tasks.rl.sampling.samples import Samples, SamplingSettings

_KEPT = 2
"""Folders of adapters that stay: the server may still read the one before."""


class VLLMSampler:
    """Draws completions from a vLLM server, for a model of which only the adapter changes.

    Start the server with room for changing adapters, on this machine or one that sees the same folders:

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 32 \
            --logprobs-mode processed_logprobs

    Without the last option the log-probabilities are those of temperature 1, whatever the temperature.
    `load` writes the adapter folder of each version and lets the server load it as ``policy-v<version>``. The name is
    new each time, because the server keeps what it has computed under a name. Prompts and completions go over as
    tokens, never as text, so that both sides speak of the same tokens. A request that fails is sent once more.

    Args:
        url: Address of the server, such as ``http://localhost:8000``.
        folder: Folder of this run for the adapters, which the server must see under the same path.
        max_rank: The ``--max-lora-rank`` that the server was started with.
        timeout: Seconds to wait for an answer to a request.
        stop_ids: Tokens that end a completion, beside those that the server knows of the base.

    Raises:
        ConfigError: If ``url`` is not one of http, or a number is out of its range.
    """

    def __init__(
        self, url: str, folder: str | Path, max_rank: int = 16, timeout: float = 600.0, stop_ids: Sequence[int] = ()
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise SamplingSettingError(
                f"url must be the address of a vLLM server, such as http://localhost:8000, got {url!r}."
            )
        if max_rank < 1 or not timeout > 0:
            raise SamplingSettingError(f"max_rank and timeout must be above 0, got {max_rank} and {timeout}.")
        self.url, self.folder = url.rstrip("/"), Path(folder).absolute()
        self.max_rank, self.timeout, self.stop_ids = max_rank, timeout, list(stop_ids)
        self._version: int | None = None

    def load(self, model: nn.Module, version: int) -> None:
        """Hand the present adapter of ``model`` to the server.

        Raises:
            ConfigError: If the model has no adapter, or one of a higher rank than the server takes.
            SamplerError: If the server cannot be asked, or refuses the adapter.
        """
        if version == self._version:
            return
        ranks = {
            name: max(spec.rank for spec in layer.lora_specs.values()) for name, layer in lora_layers(model).items()
        }
        if not ranks:
            raise SamplingSettingError(
                "a vLLM server is given adapters only, and this model has none: train with LoRA."
            )
        name, rank = max(ranks.items(), key=lambda pair: pair[1])
        if rank > self.max_rank:
            raise SamplingSettingError(
                f"{name} has rank {rank}, and the server takes up to {self.max_rank}: start it with --max-lora-rank "
                f"{rank}, and set max_rank to that."
            )
        # One process writes and loads for all; each of them must learn if that fails.
        failed: list[Exception | None] = [self._hand_over(model, version)] if _rank() == 0 else [None]
        if dist.is_initialized():
            dist.broadcast_object_list(failed)
        if failed[0] is not None:
            raise failed[0]
        self._version = version

    def _hand_over(self, model: nn.Module, version: int) -> Exception | None:
        folder = self.folder / _name(version)
        try:
            if folder.exists():
                shutil.rmtree(folder)  # of a run that was resumed from before it
            save_adapter(model, folder)
            self._post("/v1/load_lora_adapter", {"lora_name": _name(version), "lora_path": str(folder)})
            if self._version is not None:
                self._post("/v1/unload_lora_adapter", {"lora_name": _name(self._version)})
            for old in sorted(self.folder.glob("policy-v*"), key=_number)[:-_KEPT]:
                shutil.rmtree(old)
        except (LoRAError, OSError) as error:
            return error
        return None

    def sample(
        self, prompts: list[Tensor], group_size: int, settings: SamplingSettings, generator: torch.Generator
    ) -> Samples:
        """Draw ``group_size`` completions of each prompt, which are tokens ``(length,)`` without padding.

        Raises:
            ConfigError: If no model was loaded.
            SamplerError: If the server cannot be asked, or its answer is not what was asked for.
        """
        if self._version is None:
            raise SamplingSettingError("the sampler has no model: call load first.")
        seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        asked = {
            "model": _name(self._version),
            "prompt": [prompt.tolist() for prompt in prompts],
            "n": group_size,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "stop": list(settings.stop),
            "stop_token_ids": self.stop_ids,
            "include_stop_str_in_output": True,
            "seed": seed,
            "logprobs": 0,  # of the drawn token alone
            "return_token_ids": True,
        }
        answer = self._post("/v1/completions", asked)
        try:
            if answer["model"] != _name(self._version):
                raise SamplerError(f"{self.url} answered with {answer['model']}, asked was {_name(self._version)}.")
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            rows = [_row(choice) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise SamplerError(
                f"{self.url} gave an answer without {error}: it must be a vLLM server of 0.10.2 or newer."
            ) from error
        if len(rows) != len(prompts) * group_size:
            raise SamplerError(f"{self.url} gave {len(rows)} completions, asked were {len(prompts) * group_size}.")
        return _samples(rows, self._version)

    def _post(self, path: str, content: Mapping[str, Any]) -> Any:
        """Send a request, once more if it fails on the way, and return what the answer holds."""
        body = json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        for is_last in (False, True):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    text = answer.read().decode()
                return json.loads(text) if path == "/v1/completions" else text
            except urllib.error.HTTPError as error:
                if is_last or error.code < 500:
                    raise SamplerError(f"{self.url}{path}: {error.code} {error.reason}: {_reason(error)}") from error
            except TimeoutError as error:
                raise SamplerError(f"{self.url}{path} gave no answer in {self.timeout:g} seconds.") from error
            except (OSError, ValueError, http.client.HTTPException) as error:
                if isinstance(getattr(error, "reason", None), TimeoutError):
                    raise SamplerError(f"{self.url}{path} gave no answer in {self.timeout:g} seconds.") from error
                if is_last:
                    raise SamplerError(f"{self.url}{path} cannot be asked: {error}") from error
        raise AssertionError


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _name(version: int) -> str:
    return f"policy-v{version}"


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("policy-v"))


def _reason(error: urllib.error.HTTPError) -> str:
    return error.read().decode(errors="replace").strip()[:500] or "no reason given"


def _row(choice: Mapping[str, Any]) -> tuple[list[int], list[float], bool]:
    """Tokens, log-probabilities, and whether the completion ended by itself."""
    ids, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
    if len(ids) != len(logprobs) or not all(math.isfinite(value) for value in logprobs):
        raise ValueError("a finite log-probability for each token")
    return ids, logprobs, choice["finish_reason"] == "stop"


def _samples(rows: Sequence[tuple[list[int], list[float], bool]], version: int) -> Samples:
    lengths = torch.tensor([len(ids) for ids, _, _ in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    logprobs = torch.zeros(tokens.shape)
    for row, (ids, values, _) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        logprobs[row, : len(ids)] = torch.tensor(values)
    return Samples(tokens, logprobs, lengths, torch.tensor([finished for _, _, finished in rows]), version)
