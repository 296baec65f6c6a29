"""Every shipped config is parsed, and run where this machine can."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_lora.cli.embedded import MODEL as EMBEDDED_MODEL
from lightning_lora.files.safetensors_file import read_tensors
from tests.support import toys, warm
from tests.support.commands import CONFIGS, EMBEDDED, configs, lightning_lora

# Run in test_monitor.py and in callbacks/test_grown_ranks.py.
WATCHING = ["monitor.yaml", "probe.yaml", "capacity.yaml", "rank_growth.yaml"]
PREFERENCES = ["dpo.yaml", "reward.yaml"]
POLICIES = ["grpo.yaml", "ppo.yaml", "rank1.yaml"]
METHODS = ["lora.yaml", "qlora.yaml", "full.yaml", "attention_only.yaml"]
STRATEGIES = sorted(path.name for path in (CONFIGS / "strategy").iterdir())
NEEDS_GPU = {"fsdp.yaml", "deepspeed.yaml"}
# For adapters only.
SPLITS = "tensor_parallel.yaml"


def test_every_config_says_in_its_first_lines_what_it_shows_and_the_command() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        first, second = path.read_text().splitlines()[:2]
        assert first.startswith("# "), path
        assert second.startswith("#   lightning-lora "), path


def test_every_config_is_named_here() -> None:
    shipped = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")}
    assert shipped == {
        "sft.yaml",
        "packing.yaml",
        "gpu.yaml",
        *PREFERENCES,
        *POLICIES,
        *WATCHING,
        *METHODS,
        *(f"strategy/{name}" for name in STRATEGIES),
    }


@pytest.mark.slow
def test_watching_configs_add_to_each_other(tmp_path: Path) -> None:
    done = lightning_lora("fit", *configs("sft.yaml", "lora.yaml", *WATCHING[1:]), "--print_config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "replace" not in done.stderr
    callbacks = [each["class_path"].rpartition(".")[2] for each in yaml.safe_load(done.stdout)["trainer"]["callbacks"]]
    assert {"BatchSizeMonitor", "BatchProbe", "CapacityMonitor", "RankGrowth"} <= set(callbacks)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_parses(strategy: str, tmp_path: Path) -> None:
    done = lightning_lora(
        "fit", *configs("sft.yaml", "full.yaml", f"strategy/{strategy}"), "--print_config", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    wanted = yaml.safe_load((CONFIGS / "strategy" / strategy).read_text())["trainer"]
    assert yaml.safe_load(done.stdout)["trainer"]["devices"] == wanted["devices"]


# Each method and each strategy, and together what shards what; every pair is computed in integration/test_matrix.py.
PAIRS = [
    ("lora.yaml", "ddp.yaml"),
    ("lora.yaml", "fsdp2.yaml"),
    ("attention_only.yaml", "single.yaml"),
    ("full.yaml", "fsdp2.yaml"),
    ("qlora.yaml", "ddp.yaml"),
]


def test_the_pairs_have_each_method_and_each_strategy_that_can_run_here() -> None:
    methods, strategies = zip(*PAIRS, strict=True)
    assert set(methods) == set(METHODS)
    assert {*strategies, *NEEDS_GPU, SPLITS} == set(STRATEGIES)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "strategy"), PAIRS)
def test_every_method_and_every_strategy_runs(method: str, strategy: str, tmp_path: Path) -> None:
    # Lightning starts the second process of the first pair itself.
    ranks = 1 if strategy == "single.yaml" or (method, strategy) == PAIRS[0] else 2
    done = two_steps(method, strategy, ranks, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val_loss" in done.stdout + done.stderr
    (run,) = (tmp_path / "runs" / "sft").iterdir()
    assert list((run / "checkpoints").iterdir())
    assert (run / "adapters/last/adapter_model.safetensors").is_file() == (method != "full.yaml")


@pytest.mark.slow
def test_a_quantised_base_is_not_sharded(tmp_path: Path) -> None:
    done = two_steps("qlora.yaml", "fsdp2.yaml", 2, tmp_path)
    assert done.returncode == 2
    assert "cannot shard a quantised base: use one device or ddp" in done.stderr


def two_steps(method: str, strategy: str, ranks: int, folder: Path) -> warm.Done:
    return lightning_lora(
        "fit",
        *configs("sft.yaml", method, f"strategy/{strategy}"),
        *EMBEDDED,
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=1",
        cwd=folder,
        ranks=ranks,
    )


@pytest.mark.slow
@pytest.mark.parametrize("overlays", [["lora.yaml"], ["full.yaml"], ["rank1.yaml"], ["ppo.yaml", "lora.yaml"]])
def test_policies_train(overlays: list[str], tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--data.init_args.train=prompts.jsonl", "--data.init_args.validation=prompts.jsonl"]
    sizes = [
        "--data.init_args.batch_size=2",
        "--model.init_args.max_new_tokens=4",
        "--data.init_args.validation_rows=2",
    ]
    own = [f"--model.init_args.model={EMBEDDED_MODEL}", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    done = lightning_lora("fit", *configs("grpo.yaml", *overlays), *own, *files, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val_reward" in done.stdout + done.stderr
    assert "information budget" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("config", PREFERENCES)
@pytest.mark.parametrize("method", ["lora.yaml", "full.yaml"])
def test_preferences_train(config: str, method: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"--model.init_args.model={EMBEDDED_MODEL}", "--data.init_args.train=pairs.jsonl", "--trainer.max_steps=2"]
    done = lightning_lora("fit", *configs(config, method), *own, "--data.init_args.validation_share=0.25", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val_accuracy" in done.stdout + done.stderr


# What is said where a layer cannot be split: nothing for adapters of a model with two heads.
SPLITTING = {"lora.yaml": "", "full.yaml": "tensor parallelism is for adapters", "five heads": "num_attention_heads=5"}


@pytest.mark.slow
@pytest.mark.parametrize("case", SPLITTING)
def test_layers_are_split_with_adapters_only(case: str, tmp_path: Path) -> None:
    method = case if case.endswith(".yaml") else "lora.yaml"
    model = (
        []
        if case == "five heads"
        else [f"--model.init_args.model={toys.save_llama(tmp_path / 'llama', max_position_embeddings=128)}"]
    )
    command = [*configs("sft.yaml", method, f"strategy/{SPLITS}"), *EMBEDDED, *model, "--trainer.max_steps=2"]
    done = lightning_lora("fit", *command, cwd=tmp_path, ranks=2)
    assert done.returncode == (2 if SPLITTING[case] else 0), done.stdout + done.stderr
    assert SPLITTING[case] in done.stderr
    written = (tmp_path / "runs/sft/version_0/adapters/last/adapter_model.safetensors").is_file()
    assert written != bool(SPLITTING[case])


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "batch"])
def test_packing_goes_on_top_of_a_method(packing: str, tmp_path: Path) -> None:
    done = lightning_lora(
        "fit",
        *configs("sft.yaml", "lora.yaml", "packing.yaml"),
        *EMBEDDED,
        f"--data.init_args.packing={packing}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"train: \d+ rows packed into \d+; ", done.stdout + done.stderr)
    assert "val_loss" in done.stdout + done.stderr


def test_the_config_for_a_gpu_parses(tmp_path: Path) -> None:
    command = configs("sft.yaml", "lora.yaml", "monitor.yaml", "gpu.yaml")
    done = lightning_lora("fit", *command, "--print_config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trainer = yaml.safe_load(done.stdout)["trainer"]
    assert (trainer["accelerator"], trainer["devices"], trainer["precision"]) == ("gpu", 1, "bf16-true")
    callbacks = [each["class_path"].rpartition(".")[2] for each in trainer["callbacks"]]
    assert {"TF32", "BatchSizeMonitor"} <= set(callbacks)


@pytest.mark.slow
def test_the_config_for_a_gpu_trains_on_a_cpu_too(tmp_path: Path) -> None:
    command = [*configs("sft.yaml", "lora.yaml", "packing.yaml", "gpu.yaml"), "--trainer.accelerator=cpu"]
    done = lightning_lora("fit", *command, *EMBEDDED, "--trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TF32 has no effect on the cpu." in done.stderr
    assert "packed rows: sdpa with a mask of" in done.stderr
    adapter = tmp_path / "runs/sft/version_0/adapters/last/adapter_model.safetensors"
    assert {tensor.dtype for tensor in read_tensors(adapter).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_the_other_stages_run(subcommand: str, tmp_path: Path) -> None:
    test_data = [f"--data.init_args.test={Path(EMBEDDED[2].partition('=')[2])}", "--trainer.limit_test_batches=1"]
    done = lightning_lora(
        subcommand,
        *configs("sft.yaml", "lora.yaml"),
        *EMBEDDED,
        *test_data,
        "--trainer.limit_predict_batches=1",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
