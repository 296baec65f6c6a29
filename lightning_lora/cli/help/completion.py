"""``lightning-lora completion``: a script by which a shell completes commands and options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

# Each script looks for the first word that is a command, and offers its options; before that it offers the commands.
_BASH = """\
# Completion of lightning-lora for bash
_lightning_lora() {{
    local names="{commands}" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in
{cases}
        esac
    done
    COMPREPLY=($(compgen -W "$names" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _lightning_lora lightning-lora
"""
_ZSH = """\
#compdef lightning-lora
# Completion of lightning-lora for zsh
_lightning_lora() {{
    local names="{commands}" word
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$word" in
{cases}
        esac
    done
    compadd -- ${{=names}} || _files
}}
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit }}
compdef _lightning_lora lightning-lora
"""
_CASE = '            {command}) names="{options}"; break ;;'
_FISH = """\
# Completion of lightning-lora for fish
function __lightning_lora
    for word in (commandline -opc)[2..-1]
        switch $word
{cases}
        end
    end
    string split " " "{commands}"
end
complete -c lightning-lora -a "(__lightning_lora)"
complete -c lightning-lora -f -n "not __fish_seen_subcommand_from {commands}"
"""
_FISH_CASE = """\
            case {command}
                string split " " -- "{options}"
                return"""


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
        if name.startswith("$"):
            continue  # a word of JSON Schema
        below = list(_names(part, root, f"{prefix}{name}."))
        yield from below or [f"{prefix}{name}"]
    for part in inside:
        yield from _names(part, root, prefix)


def _filled(script: str, case: str, options: Mapping[str, Sequence[str]]) -> str:
    cases = [case.format(command=command, options=" ".join(names)) for command, names in options.items()]
    return script.format(commands=" ".join(options), cases="\n".join(cases))


SHELLS = {
    "bash": partial(_filled, _BASH, _CASE),
    "zsh": partial(_filled, _ZSH, _CASE),
    "fish": partial(_filled, _FISH, _FISH_CASE),
}
