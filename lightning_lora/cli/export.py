"""Writes the adapter or the merged model of a run for other software."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from lightning_lora.cli.end_tokens import end_tokens
from lightning_lora.cli.run_source import find_source
from lightning_lora.errors import CommandError, RunSourceError, check_choice
from lightning_lora.files.adapter.folder import read_adapter_folder
from lightning_lora.files.adapter.manifest import MANIFEST_FILE
from lightning_lora.files.adapter.one_scale import check_llama_cpp, fold_scales, vllm_flags
from lightning_lora.files.adapter.peft_format import CONFIG_FILE, TENSOR_FILE
from lightning_lora.files.adapter.save_load import save_adapter
from lightning_lora.files.atomic import atomic_folder
from lightning_lora.files.generation_config import GENERATION_FILE, add_stops, stops_of
from lightning_lora.files.json_object import read_json
from lightning_lora.files.lightning_checkpoint import read_checkpoint, written_by
from lightning_lora.files.merge.merge_files import merge_files
from lightning_lora.files.merge.merged_model import save_merged
from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.study.tasks.kept_models import save_whole
from lightning_lora.tasks.by_name import task_named
from lightning_lora.tasks.pretrained import PretrainedTask

FORMATS = ("peft", "merged")
TARGETS = ("vllm", "llama.cpp")


def export(run: str | Path, out: str | Path, format: str = "peft", target: str | None = None) -> str:
    """Write the adapter or the merged model of a run to ``out``, with its tokenizer.

    Args:
        run: A run folder, a Lightning checkpoint, or an adapter folder.
        out: Folder to write.
        format: ``"peft"`` (the adapter only) or ``"merged"`` (the whole model).
        target: ``"vllm"`` or ``"llama.cpp"`` also refuses what this server would drop or misread, and folds the scale
            of every layer into its ``B``, since it knows one for all. None: the adapter as it is.

    Returns:
        A sentence or two for the user about what was written.

    Raises:
        ConfigError: If ``format`` or ``target`` is unknown.
        AdapterFileError: If there is nothing to export, or ``target`` would refuse, drop or misread something.
    """
    check_choice("format", format, FORMATS, CommandError)
    if target is not None:
        check_choice("--for", target, TARGETS, CommandError)
    source = find_source(Path(run))
    out = Path(out)
    # A server's own form of an adapter is made of a folder, and checked before anything is written to `out`.
    with tempfile.TemporaryDirectory() as scratch:
        if target and format == "peft" and not source.is_dir():
            _export_checkpoint(source, Path(scratch) / "adapter", format)
            source, origin = Path(scratch) / "adapter", source
        else:
            origin = source
        if source.is_dir():
            _export_folder(source, out, format, target)
        else:
            _export_checkpoint(source, out, format)
    done = f"{origin} written to {out} as {'a PEFT adapter' if format == 'peft' else 'a merged model'}"
    if format == "peft" and _missing_stops(out):
        done += (
            f"\nits base does not stop where its answers end: pass eos_token_id={stops_of(out)} to generate(), as in "
            f"{out / GENERATION_FILE}"
        )
    if target == "vllm":
        done += f"\nserve it with: vllm serve {_serve_arguments(out, format)}"
    if target == "llama.cpp":
        done += f"\nconvert it with: {_conversion(out, format)}"
    return done


def _export_folder(source: Path, out: Path, format: str, server: str | None = None) -> None:
    folder = read_adapter_folder(source)
    base = folder.peft.get("base_model_name_or_path")
    if format == "merged":
        if not base or not Path(base).is_dir():
            raise RunSourceError(
                f"{source} was trained on {base!r}, which is not a folder on this machine: run `lightning-lora merge "
                f"BASE {source} {out}`."
            )
        merge_files(base, source, out, end_tokens=end_tokens(source, Path(base)))
        return
    if server == "llama.cpp":
        check_llama_cpp(folder, _base_config(base))
    if server == "vllm":
        vllm_flags(folder)
    with atomic_folder(out, replaces=CONFIG_FILE) as target:
        for name in (CONFIG_FILE, TENSOR_FILE, MANIFEST_FILE, GENERATION_FILE, "README.md"):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        if server:
            fold_scales(folder, server, target)
        of_base = Path(base) if base and Path(base).is_dir() else None
        places = [place for place in (source, of_base) if place and (place / "tokenizer_config.json").is_file()]
        if places:
            AutoTokenizer.from_pretrained(places[0]).save_pretrained(target)
        ends = end_tokens(source, of_base)
        if ends:
            add_stops(target, [*_stops_of_base(base), *ends])


def _export_checkpoint(source: Path, out: Path, format: str) -> None:
    task = _load_task(source)
    if lora_layers(task) and format == "merged":
        save_merged(task, out, task.trained_tokenizer)
    elif lora_layers(task):
        save_adapter(task, out, tokenizer=task.trained_tokenizer)
    elif format == "merged":
        save_whole(task, out)
    else:
        raise RunSourceError(
            f"{source} was trained in full: it holds no adapter. Write the whole model with --format merged."
        )


def _load_task(source: Path) -> PretrainedTask:
    checkpoint = read_checkpoint(source)
    name = written_by(checkpoint)
    kind = task_named(name)
    if kind is None:
        raise RunSourceError(
            f"{source} was written by {name or 'a module that left no name'}: load it in your own code and call "
            "save_adapter(), or save_pretrained() of its model."
        )
    return kind.load_from_checkpoint(source, map_location="cpu", weights_only=True)


def _base_config(base: str | None) -> dict[str, Any] | None:
    """The ``config.json`` of a base, the part about text of it; None where it is not at hand."""
    try:
        config = None if base is None else AutoConfig.from_pretrained(base, local_files_only=not Path(base).is_dir())
    except (OSError, ValueError):
        return None
    return None if config is None else config.get_text_config().to_dict()


def _conversion(out: Path, format: str) -> str:
    """The command of llama.cpp that converts what was written."""
    if format == "merged":
        return f"python convert_hf_to_gguf.py {out}"
    base = read_json(out / CONFIG_FILE).get("base_model_name_or_path")
    option = "--base" if base and Path(base).is_dir() else "--base-model-id"
    missing = _missing_stops(out)
    run = f", and serve it with --override-kv tokenizer.ggml.eot_token_id=int:{missing[0]}" if missing else ""
    return f"python convert_lora_to_gguf.py {out} {option} {base}{run}"


def _serve_arguments(out: Path, format: str) -> str:
    if format == "merged":
        return str(out)
    folder = read_adapter_folder(out)
    stops = f" --generation-config {out}" if _missing_stops(out) else ""
    return f"{folder.peft.get('base_model_name_or_path')} {vllm_flags(folder)} --lora-modules adapter={out}{stops}"


def _missing_stops(out: Path) -> list[int]:
    """The tokens that end the answers of an adapter, and at which its base alone would go on."""
    if not (out / GENERATION_FILE).is_file():
        return []
    base = _stops_of_base(read_json(out / CONFIG_FILE).get("base_model_name_or_path"))
    return [token for token in stops_of(out) if token not in base]


def _stops_of_base(base: str | None) -> list[int]:
    """The tokens at which a base stops, a folder or a hub name; empty if it is not on this machine."""
    try:
        found = None if base is None else GenerationConfig.from_pretrained(base, local_files_only=True).eos_token_id
    except (OSError, ValueError):
        config = _base_config(base) or {}
        found = config.get("eos_token_id")
    return [] if found is None else [found] if isinstance(found, int) else list(found)
