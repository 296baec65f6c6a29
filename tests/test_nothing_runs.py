"""Nothing that a file, a config or a name holds runs: each case would leave a file, the sentinel, and must not."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lightning_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lightning_lora.cli import main as cli
from lightning_lora.cli.embedded import MODEL
from lightning_lora.data import SFTDataModule
from lightning_lora.files.lightning_checkpoint import read_checkpoint
from lightning_lora.study.matched.record import read_study
from lightning_lora.study.matched.spec import read_spec
from lightning_lora.study.report.write import write_report
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.rl.rewards.named import NamedReward
from tests.support import toys
from tests.support.commands import EMBEDDED, configs
from tests.support.payload import Payload
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.toys import Toy

pytestmark = [pytest.mark.filterwarnings("ignore")]
FIT = ["fit", *configs("sft.yaml", "lora.yaml"), *EMBEDDED]


class Case:
    """A folder to put a trap in, the file that the trap would write, and code that would write it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sentinel = folder, folder / "sentinel"
        self.module = f"open({str(self.sentinel)!r}, 'w').close()\n"
        self.yaml = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{self.sentinel}']]"

    def config(self, text: str) -> int:
        (self.folder / "own.yaml").write_text(text)
        return cli.main([*FIT, f"--config={self.folder / 'own.yaml'}"])

    def checkpoint(self, **more: Any) -> Path:
        path = self.folder / "trap.ckpt"
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "global_step": 0, "epoch": 0} | more, path)
        return path

    def rows(self) -> str:
        turns = [{"role": "user", "content": "five"}, {"role": "assistant", "content": "five"}]
        (self.folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        return str(self.folder / "rows.jsonl")

    def model(self, name: str, auto: str) -> Path:
        """A copy of the embedded model that names code of its own folder."""
        folder = self.folder / "model"
        folder.mkdir()
        for file in MODEL.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "trap.py").write_text(self.module)
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": {auto: "trap.Trap"}, "model_type": "trap"}))
        return folder


def b52_adapter(case: Case) -> None:
    module = toys.Net()
    inject_lora(module, LoRAConfig(rank=2))
    folder = save_adapter(module, case.folder / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    torch.save(Payload(case.sentinel), folder / "adapter_model.bin")
    load_adapter(toys.Net(), folder)


def b53_read(case: Case) -> None:
    read_checkpoint(case.checkpoint(optimizer_states=Payload(case.sentinel)))


def b53_inspect(case: Case) -> None:
    cli.main(["inspect", str(case.checkpoint(rng=Payload(case.sentinel)))])


def b53_resume(case: Case) -> None:
    cli.main([*FIT, f"--ckpt_path={case.checkpoint(loops=Payload(case.sentinel))}"])


def b53_bare_pickle(case: Case) -> None:
    (case.folder / "bare.ckpt").write_bytes(pickle.dumps(Payload(case.sentinel)))
    cli.main(["inspect", str(case.folder / "bare.ckpt")])


def b54_instantiator(case: Case) -> None:
    (case.folder / "trap.py").write_text(case.module)
    hparams = {"_instantiator": "trap.build", "_class_path": "trap.Module", "seed": 0}
    Toy.load_from_checkpoint(case.checkpoint(hyper_parameters=hparams), weights_only=True)


def b54_class_path(case: Case) -> None:
    (case.folder / "trap.py").write_text(case.module)
    hparams = {"_instantiator": "trap.build", "_class_path": "trap.Module"}
    cli.main([*FIT, f"--ckpt_path={case.checkpoint(hyper_parameters=hparams)}"])


def b66_config(case: Case) -> None:
    case.config(f"trainer:\n  max_steps: {case.yaml}\n")


def b66_study(case: Case) -> None:
    (case.folder / "study.yaml").write_text(f"arms: {case.yaml}\n")
    read_spec(case.folder / "study.yaml")


def b66_study_folder(case: Case) -> None:
    (case.folder / "study.yaml").write_text(f"arms: {case.yaml}\n")
    read_study(case.folder)


def b66_run_config(case: Case) -> None:
    (case.folder / "config.yaml").write_text(f"trainer: {case.yaml}\n")
    (case.folder / "events.jsonl").write_text("")
    write_report(case.folder)


def b67_callback(case: Case) -> None:
    case.config(
        f"trainer:\n  callbacks:\n    - class_path: os.system\n      init_args: {{command: touch {case.sentinel}}}\n"
    )


def b67_model(case: Case) -> None:
    case.config(f"model:\n  class_path: subprocess.Popen\n  init_args: {{args: [touch, {case.sentinel}]}}\n")


def b67_own_class(case: Case) -> None:
    (case.folder / "trap.py").write_text(case.module)
    case.config("data:\n  class_path: trap.Data\n")


def b67_reward(case: Case) -> None:
    (case.folder / "trap.py").write_text(case.module)
    NamedReward("trap.reward")


def b67_import_in_name(case: Case) -> None:
    NamedReward(f"__import__('os').system('touch {case.sentinel}').x")


def b83_template(case: Case) -> None:
    attack = f"cycler.__init__.__globals__.os.system('touch {case.sentinel}')"
    SFTDataModule(case.rows(), tokenizer=tiny_tokenizer(f"{{{{ {attack} }}}}")).setup()


def b83_template_setting(case: Case) -> None:
    attack = f"''.__class__.__base__.__subclasses__()[140].__init__.__globals__['system']('touch {case.sentinel}')"
    data = SFTDataModule(case.rows(), tokenizer=tiny_tokenizer(), chat_template=f"{{{{ {attack} }}}}")
    data.setup()


def remote_model(case: Case) -> None:
    CausalLM(str(case.model("config.json", "AutoModelForCausalLM"))).configure_model()


def remote_config(case: Case) -> None:
    CausalLM(str(case.model("config.json", "AutoConfig"))).configure_model()


def remote_tokenizer(case: Case) -> None:
    SFTDataModule(case.rows(), tokenizer=str(case.model("tokenizer_config.json", "AutoTokenizer"))).setup()


def report_of_templates(case: Case) -> None:
    """Texts of a run are shown in its report, and are no part of the template that shows them."""
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {case.sentinel}') }}}}"
    (case.folder / "config.yaml").write_text(json.dumps({"model": {"class_path": attack}, "seed_everything": attack}))
    (case.folder / "metrics.csv").write_text(f"step,train_loss,{attack.replace(',', ' ')}\n0,1.0,1\n1,0.5,1\n")
    (case.folder / "events.jsonl").write_text(json.dumps({"event": "run_start", "name": attack}) + "\n")
    write_report(case.folder)


CASES: dict[Callable[[Case], None], str] = {
    b52_adapter: "never opened",
    b53_read: "never unpickled",
    b53_inspect: "never unpickled",
    b53_resume: "never unpickled",
    b53_bare_pickle: "does not begin like a checkpoint",
    b54_instantiator: "not in the allowlist",
    b54_class_path: "'trap.Module' is not allowed",
    b66_config: "has the tag",
    b66_study: "has the tag",
    b66_study_folder: "has the tag",
    b66_run_config: "has the tag",
    b67_callback: "'os.system' is not allowed",
    b67_model: "'subprocess.Popen' is not allowed",
    b67_own_class: "'trap.Data' is not allowed",
    b67_reward: "module trap is not allowed",
    b67_import_in_name: "is not allowed",
    b83_template: "is unsafe",
    b83_template_setting: "is unsafe",
    remote_model: "cannot be used",
    remote_config: "contains custom code",
    remote_tokenizer: "",
    report_of_templates: "",
}
"""What is done, and words of the answer; none where it works without the trap."""


@pytest.mark.parametrize("trap", CASES, ids=lambda trap: trap.__name__)
def test_what_a_file_names_is_not_run(
    trap: Callable[[Case], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    case, answer = Case(tmp_path), ""
    try:
        trap(case)
    except (Exception, SystemExit) as error:
        answer = str(error)
        assert CASES[trap], answer
    assert CASES[trap] in answer + capsys.readouterr().err
    assert not case.sentinel.exists()
    assert "trap" not in sys.modules


def test_the_traps_would_show_what_is_run(tmp_path: Path) -> None:
    case = Case(tmp_path)
    pickle.load(io.BytesIO(pickle.dumps(Payload(case.sentinel))))
    assert case.sentinel.exists()
    case.sentinel.unlink()
    exec(case.module)
    assert case.sentinel.exists()
    with pytest.raises(Exception, match="trap"):
        AutoConfig.from_pretrained(case.model("config.json", "AutoConfig"), trust_remote_code=True)
