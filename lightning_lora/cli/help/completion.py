"""``lightning-lora completion``: a script by which a shell completes commands and options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_BASH = """\
# Completion of lightning-lora for bash, and for zsh after: autoload -U +X bashcompinit && bashcompinit
_lightning_lora() {{
    local words="{commands}" current="${{COMP_WORDS[COMP_CWORD]}}" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in
{cases}
        esac
    done
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _lightning_lora lightning-lora
"""
_CASE = '            {command}) words="{options}"; break ;;'
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def completion_script(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """The script of a shell of `SHELLS`.

    Args:
        shell: Its name.
        options: The options of each command, such as ``--out``.
    """
    return SHELLS[shell](options)


def fit_options(schema: Mapping[str, Any]) -> list[str]:
    """The options of ``fit`` by the schema of its configs: ``--trainer.max_steps``, ``--model.init_args.lora.rank``."""
    return ["--config", "--help", "--print_config", *dict.fromkeys(f"--{name}" for name in _names(schema, schema, ""))]


def _names(schema: Mapping[str, Any], root: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The dotted names of all settings below a part of the schema."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    inside = [*schema.get("anyOf", ()), *(case["then"] for case in schema.get("allOf", ()))]
    for name, part in schema.get("properties", {}).items():
        below = list(_names(part, root, f"{prefix}{name}."))
        yield from below or [f"{prefix}{name}"]
    for part in inside:
        yield from _names(part, root, prefix)


def _bash(options: Mapping[str, Sequence[str]]) -> str:
    cases = [_CASE.format(command=command, options=" ".join(names)) for command, names in options.items()]
    return _BASH.format(commands=" ".join(options), cases="\n".join(cases))


def _zsh(options: Mapping[str, Sequence[str]]) -> str:
    return _ZSH + _bash(options)


def _fish(options: Mapping[str, Sequence[str]]) -> str:
    complete = "complete -c lightning-lora"
    lines = ["# Completion of lightning-lora for fish"]
    lines.append(f"{complete} -f -n __fish_use_subcommand -a '{' '.join(options)}'")
    for command, names in options.items():
        named = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names]
        lines += [f"{complete} -n '__fish_seen_subcommand_from {command}' {name}" for name in named]
    return "\n".join(lines) + "\n"


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
