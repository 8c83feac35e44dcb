"""Configs, checkpoints and names that mean harm: nothing in them is run, nothing is written elsewhere."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lora.cli import main
from lightning_lora.config.settings import read_config
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.errors import UserError
from lightning_lora.evaluation.metrics import label_tags
from lightning_lora.runs.checkpoints import read_checkpoint
from lightning_lora.runs.folder import RunFolder
from tests.conftest import make_rows, write_csv


def callback(path: str, **init: object) -> str:
    return yaml.safe_dump({"trainer": {"callbacks": [{"class_path": path, "init_args": init}]}})


#: ``MARK`` is the file that one of them would make if it were run.
CONFIGS = {
    "os.system": callback("os.system", command="touch MARK"),
    "subprocess": callback("subprocess.Popen", args=["touch", "MARK"]),
    "exec": callback("builtins.exec", source="open('MARK', 'w')"),
    "eval": callback("builtins.eval", source="open('MARK', 'w')"),
    "open": callback("builtins.open", file="MARK", mode="w"),
    "pathlib": callback("pathlib.Path.touch", self="MARK"),
    "torch.load": callback("torch.load", f="evil.ckpt", weights_only=False),
    "pickle": callback("pickle.load", file="evil.ckpt"),
    "runpy": callback("runpy.run_path", path_name="evil.py"),
    "importlib": callback("importlib.import_module", name="evil"),
    "a module to import": callback("evil.Callback"),
    "a logger of its own": yaml.safe_dump({"trainer": {"logger": {"class_path": "subprocess.Popen"}}}),
    "a lambda": callback("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.getcwd"),
    "a tag of Python": "trainer: !!python/object/apply:os.system ['touch MARK']\n",
    "a model class": yaml.safe_dump({"model": {"class_path": "evil.Model"}}),
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)),
    "holds itself": "a: &a [*a]\n",
    "climbs out": callback("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="../../outside"),
    "an absolute place": callback("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="/outside-of-all"),
    "a logger elsewhere": yaml.safe_dump(
        {
            "trainer": {
                "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "/outside"}}
            }
        }
    ),
    "a root elsewhere": yaml.safe_dump({"trainer": {"default_root_dir": "/outside"}}),
    "one key twice": "model:\n  method: lora\nmodel:\n  method: head\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_runs_nothing_and_writes_nothing(tmp_path: Path, tiny_base: Path, capsys, name: str) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Callback: pass\nclass Model: pass\n")
    (tmp_path / "evil.ckpt").write_bytes(evil_pickle(mark))
    write_csv(tmp_path / "rows.csv", make_rows(60))
    good = {"model": {"base_model": str(tiny_base)}, "data": {"source": "rows.csv"}}
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(good))
    (tmp_path / "bad.yaml").write_text(CONFIGS[name].replace("MARK", str(mark)))
    before = set(tmp_path.rglob("*"))
    status = main(["fit", "--config", "good.yaml", "--config", "bad.yaml", "--trainer.max_steps", "1"])
    said = capsys.readouterr().err
    assert status == 2, said
    assert len(said.strip().splitlines()) == 1 and "Traceback" not in said
    assert set(tmp_path.rglob("*")) == before and not Path("/outside").exists()


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def evil_pickle(mark: Path, **more: object) -> bytes:
    return pickle.dumps({"state_dict": Evil(mark), **more})


def checkpoints(mark: Path) -> dict[str, bytes]:
    """Ten files that would run something if they were trusted."""
    import io

    def saved(content: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    def archive(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr(name, content)
            file.writestr("archive/version", "3")
        return buffer.getvalue()

    weights = {"w": torch.ones(2)}
    return {
        "a bare pickle": evil_pickle(mark),
        "among weights": saved({"state_dict": {**weights, "x": Evil(mark)}}),
        "in the optimizer": saved({"state_dict": weights, "optimizer_states": [Evil(mark)]}),
        "in the callbacks": saved({"state_dict": weights, "callbacks": {"x": Evil(mark)}}),
        "in the hyperparameters": saved({"state_dict": weights, "hyper_parameters": Evil(mark)}),
        "a class to import": saved({"state_dict": weights, "lightning_lora": Path("x")}),
        "a hand-made archive": archive("archive/data.pkl", evil_pickle(mark)),
        "a name that climbs out": archive("../../data.pkl", evil_pickle(mark)),
        "a global of torch": pickle.dumps({"state_dict": torch.serialization.load}),
        "an old format": b"\x80\x02c" + b"posix\nsystem\nX\x05\x00\x00\x00touchtR.",
    }


@pytest.mark.parametrize("name", list(checkpoints(Path("x"))))
def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "a.ckpt"
    path.write_bytes(checkpoints(mark)[name])
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError) as raised:
        read_checkpoint(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert set(tmp_path.rglob("*")) == before


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(content=st.binary(max_size=300), zipped=st.booleans())
def test_any_bytes_as_a_checkpoint_are_refused(tmp_path: Path, content: bytes, zipped: bool) -> None:
    path = tmp_path / "a.ckpt"
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3")
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


@FUZZ
@given(content=st.one_of(st.binary(max_size=200), st.text("ab:{}[]&*!|>-\n \t'\"<?%@`0", max_size=120).map(str.encode)))
def test_any_bytes_as_a_config_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    try:
        assert isinstance(read_config(tmp_path / "a.yaml"), dict)
    except UserError as error:
        assert "\n" not in str(error) and "a.yaml" in str(error)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_a_hostile_adapter_runs_nothing(tmp_path: Path, tiny_base: Path, name: str) -> None:
    """A pickle by the name of the weights, weights that only a pickle could be, a config that names code to import."""
    write_csv(tmp_path / "rows.csv", make_rows(60))
    trainer = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    given = ["--config", str(tmp_path / "a.yaml"), "--data.source", "rows.csv", "--model.base_model", str(tiny_base)]
    assert main(["fit", *given, "--name", "run", "--data.max_length", "24"]) == 0
    assert main(["export", "--run", "logs/run", "--formats", "[adapter]", "--rows", "5"]) == 0
    adapter, mark = Path("logs/run/export/adapter"), tmp_path / "mark"
    if name == "adapter_config.json":
        config = json.loads((adapter / name).read_text())
        config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
        (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
        (adapter / name).write_text(json.dumps(config))
    else:
        (adapter / "adapter_model.safetensors").unlink()
        (adapter / name).write_bytes(evil_pickle(mark))
    status = main(["predict", "--run", "logs/run", "--checkpoint", str(adapter), "a text"])
    assert status == (0 if name == "adapter_config.json" else 2)  # nothing of PEFT's config is needed to load it
    assert not mark.exists()


PARTS = [
    "..",
    "/etc/x",
    "a/b",
    "a\\b",
    "~",
    "$HOME",
    "`id`",
    "; rm -rf x",
    "a\nb",
    "\0",
    "%2e%2e",
    "CON",
    "-rf",
    " ",
    ".",
]
NAMES = [
    f"{before}{part}{after}" for part in PARTS for before, after in (("", ""), ("x", "y"), ("../", ""), ("/", "/z"))
]
NAMES += ["", "x" * 300, "é", "🎬", "a:b", "a*b", "<b>", "|", "a\tb", "a\u202eb", "../" * 20 + "etc", ".hidden", "..x"]
NAMES += [f"logs/../../{i}" for i in range(27)]


def test_there_are_a_hundred_names() -> None:
    assert len(NAMES) == 100


def test_hostile_names_of_runs_stay_in_the_logs_folder(tmp_path: Path) -> None:
    logs = tmp_path / "place" / "logs"
    for name in NAMES:
        try:
            folder = RunFolder.create(logs, name, "x", "{}\n")
        except UserError:
            pass
        else:
            assert folder.path.parent == logs and folder.path.resolve().parent == logs.resolve()
        made = RunFolder.create(logs, None, name, "{}\n")  # a data file may be called anything
        assert made.path.resolve().parent == logs.resolve()
    assert {p.name for p in tmp_path.iterdir()} == {"place"} and {p.name for p in logs.parent.iterdir()} == {"logs"}


def test_hostile_names_of_labels_and_data_are_only_names(tmp_path: Path) -> None:
    names = [name for name in NAMES if name.strip() and "\0" not in name]
    for tag in label_tags(names):
        assert "/" not in tag and "\n" not in tag
    inside = tmp_path / "data"
    inside.mkdir()
    for i, name in enumerate(names[:40]):
        rows = [(text, name if label == "pos" else "neg") for text, label in make_rows(40)]
        prepared = prepare(SourceOptions(str(write_csv(inside / f"{i}.csv", rows))))
        assert " ".join(name.split()) in prepared.label_names
    for name in NAMES:
        with pytest.raises(UserError):
            prepare(SourceOptions(f"{inside}/{name}/nothing.csv"))
    assert {p.name for p in tmp_path.iterdir()} == {"data"}


def test_a_model_that_brings_code_is_refused_and_its_code_not_run(make_base, tmp_path: Path, capsys) -> None:
    import json
    import shutil

    mark = tmp_path / "mark"
    base = Path(shutil.copytree(make_base("bert"), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nclass EvilConfig: pass\nclass EvilModel: pass\n"
    )
    write_csv(tmp_path / "rows.csv", make_rows(60))
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump({"model": {"base_model": str(base)}, "data": {"source": "rows.csv"}})
    )
    assert main(["fit", "--config", "a.yaml", "--trainer.max_steps", "1"]) == 2
    said = capsys.readouterr().err
    assert "brings code of its own, which is never run here" in said
    assert not mark.exists()


def test_a_class_path_of_one_s_own_can_be_allowed_from_outside_only(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "mine.py").write_text("import lightning\nclass Hello(lightning.Callback):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    write_csv(tmp_path / "rows.csv", make_rows(60))
    config = {"model": {"base_model": str(tiny_base)}, "data": {"source": "rows.csv", "max_length": 24}}
    config["trainer"] = {"callbacks": [{"class_path": "mine.Hello"}], "max_steps": 1, "accelerator": "cpu"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "a.yaml"]) == 2
    assert "LIGHTNING_LORA_ALLOW" in capsys.readouterr().err
    monkeypatch.setenv("LIGHTNING_LORA_ALLOW", "mine")
    assert main(["fit", "--config", "a.yaml"]) == 0
