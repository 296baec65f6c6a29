"""The commands beside ``fit``: what each takes, and the one call it makes.

Each imports what it needs when it runs, so that one command does not wait for the libraries of another.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from lightning_lora.cli.help.command import Command, CommandParser
from lightning_lora.cli.help.commands import HELP_COMMANDS
from lightning_lora.cli.mistakes.writing import full_disk, writing


def run_command(name: str, arguments: list[str]) -> None:
    """Parse the arguments of a command and run it; exits with code 2 on a wrong option."""
    COMMANDS[name].run(command_parser(name).parse_args(arguments))


def command_parser(name: str) -> CommandParser:
    """The parser of a command of `COMMANDS`."""
    command = COMMANDS[name]
    parser = CommandParser(f"lightning-lora {name}", description=command.help, epilog=f"example: {command.example}")
    command.configure(parser)
    return parser


def _place(name: str) -> str:
    """A file or folder of the command line, of which a shell leaves the ``~`` in ``--out=~/x``.

    An empty one, as of an unset variable, would be the present folder.
    """
    if not name.strip():
        raise ArgumentTypeError("the name is empty")
    return os.path.expanduser(name)


def _path(name: str) -> Path:
    return Path(_place(name))


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=_path, default=Path("demo"), help="the folder to write (default: demo)")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and adapters (default: 0)")


def _demo(arguments: Namespace) -> None:
    from lightning_lora.cli.demo import run_demo

    run_demo(arguments.out, arguments.steps, arguments.seed)


def _merge_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("base", type=_place, help="folder of a Hugging Face checkpoint in safetensors")
    parser.add_argument("adapter", type=_place, help="an adapter folder, ours or PEFT's")
    parser.add_argument("out", type=_place, help="the folder to write")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 for all weights; by default each keeps its own")
    parser.add_argument(
        "--allow-other-base", action="store_true", help="merge into weights the adapter was not trained on"
    )


def _merge(arguments: Namespace) -> None:
    from lightning_lora.cli.end_tokens import end_tokens
    from lightning_lora.cli.run_source import check_merge_order
    from lightning_lora.files.merge.merge_files import merge_files

    check_merge_order(Path(arguments.base), Path(arguments.adapter))
    with full_disk(arguments.out):
        certificate = merge_files(
            arguments.base,
            arguments.adapter,
            arguments.out,
            arguments.dtype,
            arguments.allow_other_base,
            end_tokens(Path(arguments.adapter), Path(arguments.base)),
        )
    print(f"{arguments.out}: {certificate}")


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=_place, help="a run folder, a Lightning checkpoint, or an adapter folder")
    parser.add_argument("out", type=_place, help="the folder to write")
    parser.add_argument("--format", default="peft", help="peft (the adapter only) or merged (the whole model)")
    parser.add_argument("--for", dest="target", help="vllm or llama.cpp: write what it computes as trained, or refuse")


def _export(arguments: Namespace) -> None:
    from lightning_lora.cli.export import export

    with full_disk(arguments.out):
        print(export(arguments.run, arguments.out, arguments.format, arguments.target))


def _generate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=_path, help="a run folder, a checkpoint, an adapter folder, or a model folder")
    asked = parser.add_argument_group("what is asked (by default three rows of the validation file of the run)")
    asked.add_argument("--prompt", action="append", metavar="TEXT", help="a question (repeatable)")
    asked.add_argument("--prompts", metavar="FILE", help="a file with rows as for training, or a .txt with lines")
    asked.add_argument("--system", metavar="TEXT", help="system message of every conversation")
    asked.add_argument("--limit", type=int, metavar="N", help="only the first N prompts of the file")
    asked.add_argument("--chat", action="store_true", help="talk to the model; /compare, /base, /reset, /quit")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--compare", action="store_true", help="show what the base answers beside it")
    answers.add_argument("--out", type=_path, metavar="FILE", help="write all answers to this file, as JSON lines")
    answers.add_argument("--max_new_tokens", type=int, metavar="N", help="tokens of an answer at most (default: 256)")
    answers.add_argument("--temperature", type=float, help="0 takes the most probable token (the default)")
    answers.add_argument("--top_p", type=float, help="draw from the most probable tokens up to this sum (default: 1)")
    answers.add_argument("--top_k", type=int, metavar="N", help="draw from the N most probable tokens (default: all)")
    answers.add_argument("--stop", action="append", metavar="TEXT", help="a text that ends an answer (repeatable)")
    answers.add_argument("--seed", type=int, help="seed of the draws (default: 0)")
    answers.add_argument("--batch_size", type=int, metavar="N", help="prompts answered together (default: 8)")
    model = parser.add_argument_group("model")
    model.add_argument("--which", metavar="last|best", help="which model of a run folder (default: last)")
    model.add_argument("--base", help="folder or hub name of the base, in place of the recorded one")
    model.add_argument("--allow-other-base", action="store_true", help="use a base the adapter was not trained on")
    model.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, else float32)")
    model.add_argument("--device", help="a device as torch names it (default: a GPU if there is one, else cpu)")
    model.add_argument("--chat_template", help="name, file or text of a chat template, in place of that of the run")
    model.add_argument("--chat_template_kwargs", metavar="JSON", help="variables of the chat template")


def _generate(arguments: Namespace) -> None:
    from lightning_lora.cli.generate.command import run_generate

    with full_disk(f"--out {arguments.out}"):
        run_generate(arguments)


def _inspect_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", type=_place, help="a run folder, an adapter folder or an adapter-only checkpoint")
    parser.add_argument("--verify", action="store_true", help="require hashes, and say that they agree")


def _inspect(arguments: Namespace) -> None:
    import torch

    from lightning_lora.cli.inspection import inspect_path, verify_hashes
    from lightning_lora.cli.inspection_table import show
    from lightning_lora.cli.run_source import find_source

    # Threads take longer to start than the spectra of thin matrices take.
    torch.set_num_threads(1)
    inspection = inspect_path(find_source(Path(arguments.path)))
    show(inspection)
    if arguments.verify:
        print(verify_hashes(inspection))


def _consolidate_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=_place, help="a folder of shards that a sharded strategy has written")
    parser.add_argument("out", type=_place, help="the checkpoint file to write")


def _consolidate(arguments: Namespace) -> None:
    from lightning_lora.checkpoints.consolidate import consolidate

    with full_disk(arguments.out):
        print(f"written: {consolidate(arguments.folder, arguments.out)}")


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=_path, help="the folder of a run, or of a study, finished or not")
    parser.add_argument("--watch", action="store_true", help="write it again while the run goes on")


def _report(arguments: Namespace) -> None:
    from lightning_lora.study.report.watch import watch
    from lightning_lora.study.report.write import report_files, write_report

    with writing(f"the report in {arguments.folder}"):
        folder, page = watch(arguments.folder) if arguments.watch else write_report(arguments.folder)
    print("\n".join([page.verdict.text, *(words.text for words in page.lede[:1])]))
    print(f"report: {report_files(folder)}")


def _evaluate_arguments(parser: ArgumentParser) -> None:
    from lightning_lora.cli.study.evaluate import add_arguments

    add_arguments(parser)


def _evaluate(arguments: Namespace) -> None:
    from lightning_lora.cli.study.evaluate import evaluate

    evaluate(arguments)


def _completion_arguments(parser: ArgumentParser) -> None:
    from lightning_lora.cli.help.completion import SHELLS

    parser.add_argument("shell", choices=SHELLS, help="the shell; its script is printed")


def _completion(arguments: Namespace) -> None:
    from lightning_lora.cli.help.completion import completion_script, fit_options
    from lightning_lora.cli.help.schema import config_schema
    from lightning_lora.cli.help.short_help import OPTIONS
    from lightning_lora.cli.plan import command as plan
    from lightning_lora.cli.study import command as study

    of_fit = fit_options(config_schema())
    options = dict.fromkeys(OPTIONS, of_fit)
    options |= {"plan": [*plan.option_parser().options(), *of_fit], "study": study.option_parser().options()}
    options |= {name: command_parser(name).options() for name in COMMANDS}
    print(completion_script(arguments.shell, options), end="")


COMMANDS = {
    "demo": Command(
        "Fine-tune the embedded model on embedded GSM8K rows, with LoRA and in full; then save, merge and check.",
        "lightning-lora demo",
        _demo_arguments,
        _demo,
    ),
    "merge": Command(
        "Fold an adapter into a base checkpoint, shard by shard; the base is only read.",
        "lightning-lora merge models/base runs/sft/version_0/adapters/last merged",
        _merge_arguments,
        _merge,
    ),
    "export": Command(
        "Write the adapter or the merged model of a run for other software, with its tokenizer.",
        "lightning-lora export runs/sft/version_0 exported --format peft --for vllm",
        _export_arguments,
        _export,
    ),
    "generate": Command(
        "Answer prompts with a trained model, beside the answers of its base; or chat with it.",
        "lightning-lora generate runs/sft/version_0 --compare",
        _generate_arguments,
        _generate,
    ),
    "inspect": Command(
        "Show what an adapter or checkpoint is: base, ranks, roles, norms, spectra, health.",
        "lightning-lora inspect runs/sft/version_0 --verify",
        _inspect_arguments,
        _inspect,
    ),
    "report": Command(
        "Rebuild the report of a run or study from its folder: report.html, report.md and report.csv.",
        "lightning-lora report runs/sft/version_0",
        _report_arguments,
        _report,
    ),
    "evaluate": Command(
        "Benchmark the models of a study, or of a run, on tasks of lm-eval, and compare them question by question.",
        "lightning-lora evaluate runs/ranks --tasks gsm8k --limit 50",
        _evaluate_arguments,
        _evaluate,
    ),
    "consolidate": Command(
        "Write a folder of shards as one checkpoint file, which every strategy reads.",
        "lightning-lora consolidate runs/sft/version_0/checkpoints/last.ckpt whole.ckpt",
        _consolidate_arguments,
        _consolidate,
    ),
    "completion": Command(
        "Print the script by which a shell completes commands and options; put it where the shell looks for them.",
        "lightning-lora completion bash",
        _completion_arguments,
        _completion,
    ),
    **HELP_COMMANDS,
}
